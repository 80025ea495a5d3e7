"""Compare a slime command line with the Hugging Face checkpoint that its engines load.

The trainer's architecture must be the checkpoint's (slime asserts part of it, slime/utils/arguments.py:1227), its
embedding must have the rows that the engines expect at each weight sync, and FP8 weights must be in the one format
that slime syncs, cut so that no 128-block is split between GPUs.  Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.contract import hf_model
from training.contract.contract import Problem
from training.contract.rules import BLOCK, RECIPE, located
from training.contract.setup import SlimeSetup

OLD_DEFAULT_THETA = 10000  # of Qwen2Config in transformers 4, with which slime works
SYNC = "slime/backends/megatron_utils/megatron_to_hf/__init__.py"
# key of quantization_config -> (value, line that asserts it at the first weight sync)
QUANTIZATION = {"quant_method": ("fp8", 40), "fmt": ("e4m3", 41), "activation_scheme": ("dynamic", 42)}


def check(setup: SlimeSetup, config: dict[str, Any], name: str) -> list[Problem]:
    """Differences between the command line and config.json; `name` is how messages call the config."""
    problems = hf_model.check(setup.megatron, config, name, sequences=False)
    problems += [*_rotary_base(setup, config, name), *_vocabulary(setup, config, name)]
    if not setup.train_only:
        problems += [*_context(setup, config, name), *_quantization(setup, config, name)]
    return problems


def _rotary_base(setup: SlimeSetup, config: dict[str, Any], name: str) -> Iterator[Problem]:
    """Only said where the value is right: else hf_model has found it."""
    theta = hf_model.rope_theta(config)
    if config.get("rope_theta") is None and theta == setup.rotary_base != OLD_DEFAULT_THETA:
        message = f"is in rope_parameters only (transformers 5), transformers 4 would read {OLD_DEFAULT_THETA} instead"
        yield Problem("warning", "--rotary-base", message, name)


def _vocabulary(setup: SlimeSetup, config: dict[str, Any], name: str) -> Iterator[Problem]:
    wanted, given = config.get("vocab_size"), setup.vocab_size
    if wanted is None:
        return
    if not setup.train_only and given is not None and given != wanted:
        # slime/backends/megatron_utils/update_weight_utils.py:143 cuts the embedding to it.
        message = f"the engines expect vocab_size {wanted} rows at each weight sync, found {given}"
        yield Problem("error", "--vocab-size", message, name)
    elif setup.padded_vocab_size and setup.padded_vocab_size != wanted:
        yield Problem(
            "error", "--padded-vocab-size", f"expected vocab_size {wanted}, found {setup.padded_vocab_size}", name
        )
    else:
        yield from hf_model.check_vocab(setup.megatron, config, name)


def _context(setup: SlimeSetup, config: dict[str, Any], name: str) -> Iterator[Problem]:
    """An engine refuses a request whose prompt and response could exceed its context."""
    context = setup.sglang_context_length or config.get("max_position_embeddings")
    lengths = {"--rollout-max-response-len": setup.rollout_max_response_len}
    if setup.eval_interval is not None and setup.eval_max_response_len is not None:
        lengths["--eval-max-response-len"] = setup.eval_max_response_len
    for flag, length in lengths.items():
        if context is not None and length >= context:
            message = f"{length} leaves no room for a prompt in the engines' context of {context} tokens ({name})"
            yield Problem("error", flag, message, "sglang srt/managers/tokenizer_manager.py")


def _quantization(setup: SlimeSetup, config: dict[str, Any], name: str) -> Iterator[Problem]:
    quantization = config.get("quantization_config")
    if not quantization:
        return

    def wrong(key: str, wanted: Any, source: str) -> Problem:
        found = quantization.get(key)
        message = f"{name}: quantization_config.{key}: expected {wanted!r}, found {found!r}"
        return Problem("error", "--hf-checkpoint", message, located(source))

    for key, (wanted, line) in QUANTIZATION.items():
        if quantization.get(key) != wanted:
            yield wrong(key, wanted, f"{SYNC}:{line}")
    if quantization.get("weight_block_size") != [BLOCK, BLOCK]:
        yield wrong("weight_block_size", [BLOCK, BLOCK], RECIPE)
    bad = [f"{what} {width:g}" for what, width in engine_widths(setup).items() if width % BLOCK]
    if setup.rollout_num_gpus_per_engine > 1 and bad:
        ranks = f"{setup.rollout_num_gpus_per_engine} GPUs cut {BLOCK}-blocks"
        message = f"{ranks}: {', '.join(bad)} per GPU"
        yield Problem("error", "--rollout-num-gpus-per-engine", message, "sglang srt/layers/quantization/fp8.py")
    yield from _mixed_blocks(setup)


def _mixed_blocks(setup: SlimeSetup) -> Iterator[Problem]:
    """Megatron's linear_qkv has the query, key and value rows of each group one after another, the engines' model has
    all query rows in q_proj, and so on.  Only where both are whole blocks are their blocks the same.
    """
    s = setup.megatron
    group = {"query": s.num_attention_heads // s.query_groups * s.head_dim, "key": s.head_dim, "value": s.head_dim}
    if s.fp8 and s.fp8_recipe == "blockwise" and any(rows % BLOCK for rows in group.values()):
        rows = ", ".join(f"{count} {name} rows" for name, count in group.items())
        message = (
            f"a group has {rows}: the trainer's {BLOCK}-blocks of linear_qkv hold other rows than the engines' of "
            "q_proj, k_proj and v_proj, so some codes differ"
        )
        yield Problem("warning", "--num-query-groups", message, located("megatron/core/transformer/attention.py:995"))


def engine_widths(setup: SlimeSetup) -> dict[str, float]:
    """Widths of an engine's FP8 matrices that its GPUs share out, on one of them."""
    s, ranks = setup.megatron, setup.rollout_num_gpus_per_engine
    shared = setup.engine_attention_ranks
    return {
        "q_proj rows and o_proj columns": s.num_attention_heads // shared * s.head_dim,
        "k_proj and v_proj rows": max(1, s.query_groups // shared) * s.head_dim,
        "gate_proj and up_proj rows and down_proj columns": s.ffn / ranks,
    }
