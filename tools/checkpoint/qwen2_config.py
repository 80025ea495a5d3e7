"""A Qwen2 config.json beside Megatron's arguments: what must agree, and each made from the other.

Neither side is derived from the weights, and neither is checked by what loads them: another rope base, epsilon or split
of the heads loads without a word and gives another model. So every conversion compares them first.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

from tools.checkpoint.errors import CheckpointError, shown
from tools.checkpoint.qwen2_layout import Qwen2Shape
from tools.checkpoint.safetensors_io import read_json

DEFAULT_ROPE_BASE = 10000.0  # transformers' Qwen2Config

# Field of Qwen2Shape -> its names in config.json and in Megatron's arguments.
_SIZES = {
    "layers": ("num_hidden_layers", "num_layers"),
    "hidden": ("hidden_size", "hidden_size"),
    "ffn": ("intermediate_size", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "num_attention_heads"),
    "groups": ("num_key_value_heads", "num_query_groups"),
    "head_dim": ("head_dim", "kv_channels"),
}


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a dense Qwen2 directory. Raises CheckpointError if Megatron's Qwen2 cannot express it."""
    path = Path(directory) / "config.json"
    config = read_json(path)
    shape_of(config, path)
    for key, expected in (("hidden_act", "silu"), ("use_sliding_window", False)):
        if config.get(key, expected) != expected:
            raise CheckpointError(f"{path}: {key} is {shown(config[key])}, expected {expected!r}")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind != "default":
        raise CheckpointError(f"{path}: rope scaling {shown(kind)}, expected none: Megatron's Qwen2 has none")
    rope_base(config, path)
    norm_epsilon(config, path)
    positions = config.get("max_position_embeddings", 1)
    if type(positions) is not int or not 0 < positions < 2**31:
        raise CheckpointError(f"{path}: max_position_embeddings is {shown(positions)}, expected a positive integer")
    return config


def shape_of(config: dict[str, Any], path: Path) -> Qwen2Shape:
    """The sizes in a config.json."""
    try:
        return Qwen2Shape.from_hf_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ZeroDivisionError):
        raise CheckpointError(f"{path}: the model's sizes are not positive integers") from None


def rope_base(config: dict[str, Any], path: Path) -> float:
    """Rotary base: `rope_parameters.rope_theta` (transformers 5) or `rope_theta` (before)."""
    nested = config.get("rope_parameters")
    base = nested.get("rope_theta") if isinstance(nested, dict) else None
    base = config.get("rope_theta", DEFAULT_ROPE_BASE) if base is None else base
    return _positive(base, f"{path}: rope_theta")


def norm_epsilon(config: dict[str, Any], path: Path) -> float:
    return _positive(config.get("rms_norm_eps", 1e-6), f"{path}: rms_norm_eps")


def _positive(value: Any, name: str) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not 0 < number < math.inf:
        raise CheckpointError(f"{name} is {shown(value)}, expected a positive number")
    return number


def check_args(config: dict[str, Any], config_path: Path, args: Any, args_path: Path) -> None:
    """Raise CheckpointError at the first contradiction between a config.json and Megatron's arguments."""
    ours, theirs = shape_of(config, config_path), _shape_of_args(args, args_path)

    def differ(key: str, value: Any, name: str, other: Any) -> CheckpointError:
        return CheckpointError(f"{config_path}: {key} is {value}, but {args_path} was trained with {name} {other}")

    for field, (key, name) in _SIZES.items():
        if getattr(ours, field) != getattr(theirs, field):
            raise differ(key, getattr(ours, field), name, getattr(theirs, field))
    if ours.tied != theirs.tied:
        raise differ("tie_word_embeddings", ours.tied, "untie_embeddings_and_output_weights", not theirs.tied)
    if not theirs.qkv_bias:
        raise CheckpointError(f"{args_path}: add_qkv_bias is False, but a Qwen2 has q, k and v biases")
    for key, value, name in (
        ("rope_theta", rope_base(config, config_path), "rotary_base"),
        ("rms_norm_eps", norm_epsilon(config, config_path), "norm_epsilon"),
    ):
        other = getattr(args, name, None)
        if other is not None and _positive(other, f"{args_path}: {name}") != value:
            raise differ(key, value, name, other)


def _shape_of_args(args: Any, path: Path) -> Qwen2Shape:
    try:
        return Qwen2Shape.from_megatron_args(args)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def megatron_args(config: dict[str, Any], path: Path, *, vocab_rows: int, tensor_parallel: int) -> argparse.Namespace:
    """Megatron's arguments for a config.json: what a `release` checkpoint must carry, and the model's own.

    load_checkpoint asks for the parallel sizes and compares layers, hidden size and heads; --use-checkpoint-args takes
    the rest (megatron/training/checkpointing.py:83 and :1200 at core_v0.14.0).
    """
    shape = shape_of(config, path)
    base = rope_base(config, path)
    return argparse.Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        group_query_attention=True,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        max_position_embeddings=config.get("max_position_embeddings", 32768),
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(base) if base.is_integer() else base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        swiglu=True,
        squared_relu=False,
        qk_layernorm=False,
        multi_latent_attention=False,
        normalization="RMSNorm",
        norm_epsilon=norm_epsilon(config, path),
        apply_layernorm_1p=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_experts=None,
        vocab_size=config["vocab_size"],
        padded_vocab_size=vocab_rows,
        untie_embeddings_and_output_weights=not shape.tied,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        world_size=tensor_parallel,
        data_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of `config` for weights of torch dtype `dtype`: the dtype under the names there, no quantisation."""
    changed = {key: value for key, value in config.items() if key != "quantization_config"}
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    return changed | dict.fromkeys(names, dtype)


def check_tensor_parallel(shape: Qwen2Shape, size: int, path: Path) -> None:
    """Raise CheckpointError unless Megatron can cut this model into `size` tensor parallel ranks."""
    for name, count in (("key/value heads", shape.groups), ("heads", shape.heads), ("ffn rows", shape.ffn)):
        if count % size:
            raise CheckpointError(f"{path}: {count} {name} cannot be split over tensor parallel {size}")
