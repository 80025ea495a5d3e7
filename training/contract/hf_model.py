"""Compare Megatron's model arguments with the Hugging Face checkpoint they must describe.

Megatron never reads `config.json`: a wrong --rotary-base or one row too few in the embedding trains, and
the damage shows at conversion or in evaluation, if at all.  Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.contract.contract import Problem
from training.contract.setup import Setup

GELU_OR_SILU = "silu"


class ModelError(ValueError):
    """A config.json or tokenizer file that cannot be used; the text names file and key."""


def read_config(path: str | Path) -> dict[str, Any]:
    """The model configuration in a config.json or in the directory that holds one.

    Raises ModelError naming the file where it is missing or is no JSON object.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    if not isinstance(config, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file}: expected JSON, found {error}") from error


def rope_theta(config: dict[str, Any]) -> float | None:
    """Rotary base: `rope_parameters.rope_theta` (transformers 5) or `rope_theta` (before)."""
    nested = config.get("rope_parameters") or {}
    return nested.get("rope_theta", config.get("rope_theta"))


def _rope_scaled(config: dict[str, Any]) -> bool:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return scaling.get("rope_type", scaling.get("type", "default")) != "default"


def tokenizer_length(folder: str | Path) -> int | None:
    """len(tokenizer) of the fast tokenizer in `folder`: its vocabulary and every token added to it.

    None without a tokenizer.json (a hub name, or a slow tokenizer).  Raises ModelError on a broken file.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    data = _read_json(file)
    try:
        vocab = data["model"]["vocab"]
        tokens = set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
        tokens.update(token["content"] for token in data.get("added_tokens") or ())
    except (KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{file}: expected model.vocab and added_tokens, found none usable") from error
    settings_file = folder / "tokenizer_config.json"
    if settings_file.is_file():
        settings = _read_json(settings_file)
        tokens.update(token["content"] for token in (settings.get("added_tokens_decoder") or {}).values())
    return len(tokens)


def padded_vocab(length: int, divisor: int, tensor_parallel: int) -> int:
    """Embedding rows for a tokenizer, megatron/training/tokenizer/tokenizer.py:115-127."""
    multiple = divisor * tensor_parallel
    return math.ceil(length / multiple) * multiple


def divisor_for(rows: int, length: int, tensor_parallel: int) -> int | None:
    """A --make-vocab-size-divisible-by that pads `length` to `rows`, at as many TP sizes as possible."""
    for ranks in sorted({2**power for power in range(7, -1, -1)} | {tensor_parallel}, reverse=True):
        if rows % ranks or ranks % tensor_parallel:
            continue
        if padded_vocab(length, rows // ranks, tensor_parallel) == rows:
            return rows // ranks
    return None


def _expected(s: Setup, config: dict[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """(flag, value of the arguments, value of the config, key) for everything that must be equal."""
    a = s.args
    heads = config.get("num_attention_heads")
    yield "--num-layers", s.layers, config.get("num_hidden_layers"), "num_hidden_layers"
    yield "--hidden-size", a.hidden_size, config.get("hidden_size"), "hidden_size"
    yield "--ffn-hidden-size", s.ffn, config.get("intermediate_size"), "intermediate_size"
    yield "--num-attention-heads", a.num_attention_heads, heads, "num_attention_heads"
    groups = config.get("num_key_value_heads", heads)
    yield "--num-query-groups", s.query_groups, groups, "num_key_value_heads"
    if config.get("head_dim"):
        yield "--kv-channels", s.head_dim, config["head_dim"], "head_dim"
    elif heads and config.get("hidden_size"):
        yield "--kv-channels", s.head_dim, config["hidden_size"] // heads, "hidden_size / num_attention_heads"
    yield "--norm-epsilon", a.norm_epsilon, config.get("rms_norm_eps"), "rms_norm_eps"
    if rope_theta(config) is not None:
        yield "--rotary-base", a.rotary_base, rope_theta(config), "rope_theta"
    yield "--attention-dropout", a.attention_dropout, config.get("attention_dropout"), "attention_dropout"


def _switches(s: Setup, config: dict[str, Any]) -> Iterator[tuple[bool, str, str]]:
    """(holds, flag, message) for what a Llama-like model of Hugging Face always is."""
    a, kind = s.args, config.get("model_type", "the model")
    qkv_bias = config.get("attention_bias", kind == "qwen2")  # Qwen2 has it in code, not in the config
    qk_norm = kind == "qwen3"
    yield s.rope, "--position-embedding-type", f"expected rope for {kind}, found {a.position_embedding_type}"
    yield a.rotary_percent == 1.0, "--rotary-percent", f"expected 1.0 for {kind}, found {a.rotary_percent}"
    yield not a.rotary_interleaved, "--rotary-interleaved", f"is wrong for {kind}"
    yield a.normalization == "RMSNorm", "--normalization", f"expected RMSNorm, found {a.normalization}"
    yield not a.apply_layernorm_1p, "--apply-layernorm-1p", f"is wrong for {kind}"
    if config.get("hidden_act", GELU_OR_SILU) == "silu":
        yield a.swiglu, "--swiglu", f"is missing, {kind} has hidden_act silu"
    yield not a.add_bias_linear, "--disable-bias-linear", f"is missing, {kind} has no bias in its MLP"
    if not a.add_bias_linear:  # else --add-qkv-bias is implied, megatron/training/arguments.py:889
        wanted = "is missing" if qkv_bias else "is wrong"
        yield a.add_qkv_bias == bool(qkv_bias), "--add-qkv-bias", f"{wanted} for {kind}"
    yield a.qk_layernorm == qk_norm, "--qk-layernorm", f"is {'missing' if qk_norm else 'wrong'} for {kind}"
    yield a.hidden_dropout == 0.0, "--hidden-dropout", f"expected 0.0 for {kind}, found {a.hidden_dropout}"
    scaled = _rope_scaled(config)
    yield a.use_rope_scaling == scaled, "--use-rope-scaling", f"is {'missing' if scaled else 'wrong'} for {kind}"
    if "tie_word_embeddings" in config or kind in ("qwen2", "llama"):
        tied = bool(config.get("tie_word_embeddings", False))
        yield (
            a.untie_embeddings_and_output_weights != tied,
            "--untie-embeddings-and-output-weights",
            f"is {'given' if tied else 'missing'}, but tie_word_embeddings is {str(tied).lower()}",
        )


def check(setup: Setup, config: dict[str, Any], name: str, *, sequences: bool = True) -> list[Problem]:
    """Differences between the arguments and the config; `name` is how messages call the config.

    `sequences`: --seq-length is the length that is trained.
    """
    problems = [
        Problem("error", flag, f"expected {wanted} ({key}), found {found}", name)
        for flag, found, wanted, key in _expected(setup, config)
        if wanted is not None and found != wanted
    ]
    problems += [
        Problem("error", flag, message, name) for holds, flag, message in _switches(setup, config) if not holds
    ]
    longest = config.get("max_position_embeddings")
    if sequences and longest is not None and setup.seq > longest:
        message = f"{setup.seq} is longer than the {longest} positions the model was trained for"
        problems.append(Problem("warning", "--seq-length", message, name))
    return problems


def _length(setup: Setup) -> int | None:
    """Tokens that the embedding is padded from, None where they are not known here."""
    a = setup.args
    if getattr(a, "padded_vocab_size", None) and a.vocab_size:  # slime's, which believes --vocab-size
        return a.vocab_size
    if a.tokenizer_type == "HuggingFaceTokenizer" and a.tokenizer_model is not None:
        return tokenizer_length(a.tokenizer_model)
    if a.tokenizer_type == "NullTokenizer" and a.vocab_size is not None:
        return a.vocab_size + 1  # its end of document, megatron/training/tokenizer/tokenizer.py:823
    return None


def rows(setup: Setup) -> int | None:
    """Rows of the embedding that this run builds, None where the tokenizer's length is not known here."""
    padded = getattr(setup.args, "padded_vocab_size", None)
    if padded:
        return padded
    length = _length(setup)
    if length is None:
        return None
    return padded_vocab(length, setup.args.make_vocab_size_divisible_by, setup.tp)


def check_vocab(setup: Setup, config: dict[str, Any], name: str) -> list[Problem]:
    """The run must build as many embedding rows as the config says.

    Fewer are dropped and more are zero-filled without a word when a distributed checkpoint is loaded,
    megatron/core/tensor_parallel/layers.py:307.
    """
    wanted, length, found = config.get("vocab_size"), _length(setup), rows(setup)
    if wanted is None or found is None or found == wanted:
        return []
    given, better = setup.args.make_vocab_size_divisible_by, divisor_for(wanted, length, setup.tp)
    message = (
        f"{given} x tensor parallel {setup.tp} pads {length} tokens to {found} rows, "
        f"expected vocab_size {wanted}; {better or 'no divisor'} gives it"
    )
    return [Problem("error", "--make-vocab-size-divisible-by", message, name)]
