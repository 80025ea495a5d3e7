"""Hugging Face Qwen2 weights <-> Megatron's GPTModel, as one table.

| Megatron key (L layers stacked on axis 0)                  | rows from Hugging Face                   |
|------------------------------------------------------------|------------------------------------------|
| embedding.word_embeddings.weight                           | model.embed_tokens.weight                |
| decoder.layers.self_attention.linear_qkv.layer_norm_weight | input_layernorm.weight                   |
| decoder.layers.self_attention.linear_qkv.{weight,bias}     | for each group: its q rows, its k, its v |
| decoder.layers.self_attention.linear_proj.weight           | self_attn.o_proj.weight                  |
| decoder.layers.mlp.linear_fc1.layer_norm_weight            | post_attention_layernorm.weight          |
| decoder.layers.mlp.linear_fc1.weight                       | all of gate_proj, then all of up_proj    |
| decoder.layers.mlp.linear_fc2.weight                       | mlp.down_proj.weight                     |
| decoder.final_layernorm.weight                             | model.norm.weight                        |
| output_layer.weight (untied only)                          | lm_head.weight                           |

Optimizer states written without the distributed optimizer repeat the table under a prefix, e.g.
`optimizer.state.exp_avg.`. Checkpoints of non-homogeneous models have one key per layer,
`decoder.layers.<N>.…`, instead of the stack. The order of rows does not depend on tensor or pipeline
parallelism. Sources: megatron/core/transformer/{attention,mlp}.py (sharded_state_dict) and
models/gpt/gpt_layer_specs.py at core_v0.14.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tools.checkpoint.errors import CheckpointError, shown
from tools.checkpoint.torch_dist import MODEL_DTYPES, OPTIMIZER_PREFIX, Reader, as_torch

if TYPE_CHECKING:
    import torch

LAYERS = "decoder.layers."
# What a dense Qwen2 means in Megatron's arguments; anything else would need other keys or other arithmetic.
QWEN2_ARGS = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
}
EXTRA_STATE_MODULES = {
    "local": ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"),
}
EXTRA_STATE_MODULES["te"] = ("self_attention.core_attention", *EXTRA_STATE_MODULES["local"])


@dataclass(frozen=True)
class Qwen2Shape:
    """Sizes of a dense Qwen2. `heads` counts query heads, `groups` key/value heads, `vocab_rows` embedding
    rows.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab_rows: int
    tied: bool
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "groups", "head_dim", "vocab_rows"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise CheckpointError(f"model shape: {name} is {shown(value)}, expected a positive integer")
        if self.heads % self.groups:
            raise CheckpointError(f"model shape: {self.heads} heads cannot share {self.groups} key/value heads")

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Qwen2Shape:
        """From the dictionary in a Qwen2 config.json."""
        if config.get("model_type") != "qwen2":
            raise CheckpointError(f"config.json: model_type is {shown(config.get('model_type'))}, expected 'qwen2'")
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                ffn=config["intermediate_size"],
                heads=heads,
                groups=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocab_rows=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json: {error.args[0]} is missing") from None

    @classmethod
    def from_megatron_args(cls, args: Any) -> Qwen2Shape:
        """From Megatron's parsed arguments, e.g. `Reader.common()["args"]`. `vocab_rows` counts padding rows
        too.
        """
        for name, expected in QWEN2_ARGS.items():
            found = getattr(args, name, expected)
            if found != expected:
                wanted = f"expected {expected!r} for a dense Qwen2"
                raise CheckpointError(f"Megatron args: {name} is {shown(found)}, {wanted}")
        try:
            heads = args.num_attention_heads
            return cls(
                layers=args.num_layers,
                hidden=args.hidden_size,
                ffn=args.ffn_hidden_size,
                heads=heads,
                groups=args.num_query_groups if getattr(args, "group_query_attention", True) else heads,
                head_dim=args.kv_channels,
                vocab_rows=args.padded_vocab_size,
                tied=not args.untie_embeddings_and_output_weights,
                qkv_bias=bool(args.add_qkv_bias),
            )
        except AttributeError as error:
            raise CheckpointError(f"Megatron args: {error.name or error} is missing") from None


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor and the row ranges [start, stop) that it takes in the Megatron tensor, in its own
    order.
    """

    name: str
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """A Megatron tensor: its key, its shape (without the stack of layers), the parts it is made of."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    layer: int | None = None

    @property
    def is_vocabulary(self) -> bool:
        return self.layer is None and len(self.shape) == 2


def table(shape: Qwen2Shape) -> Iterator[Row]:
    """The tensors of the model in the order of Hugging Face's state dict, `lm_head` last."""
    hidden, ffn = shape.hidden, shape.ffn
    queries = shape.heads // shape.groups * shape.head_dim
    group = queries + 2 * shape.head_dim

    def whole(key: str, name: str, *size: int, layer: int | None = None) -> Row:
        return Row(key, size, (Part(name, ((0, size[0]),)),), layer)

    def per_group(start: int, length: int) -> tuple[tuple[int, int], ...]:
        return tuple((i * group + start, i * group + start + length) for i in range(shape.groups))

    yield whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", shape.vocab_rows, hidden)
    for layer in range(shape.layers):
        hf = f"model.layers.{layer}."
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            size = (group * shape.groups, hidden) if kind == "weight" else (group * shape.groups,)
            parts = (
                Part(f"{hf}self_attn.q_proj.{kind}", per_group(0, queries)),
                Part(f"{hf}self_attn.k_proj.{kind}", per_group(queries, shape.head_dim)),
                Part(f"{hf}self_attn.v_proj.{kind}", per_group(queries + shape.head_dim, shape.head_dim)),
            )
            yield Row(f"{LAYERS}self_attention.linear_qkv.{kind}", size, parts, layer)
        attention = shape.heads * shape.head_dim
        proj = f"{LAYERS}self_attention.linear_proj.weight"
        yield whole(proj, f"{hf}self_attn.o_proj.weight", hidden, attention, layer=layer)
        gate_up = (
            Part(f"{hf}mlp.gate_proj.weight", ((0, ffn),)),
            Part(f"{hf}mlp.up_proj.weight", ((ffn, 2 * ffn),)),
        )
        yield Row(f"{LAYERS}mlp.linear_fc1.weight", (2 * ffn, hidden), gate_up, layer)
        yield whole(f"{LAYERS}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", hidden, ffn, layer=layer)
        norm = f"{LAYERS}self_attention.linear_qkv.layer_norm_weight"
        yield whole(norm, f"{hf}input_layernorm.weight", hidden, layer=layer)
        norm = f"{LAYERS}mlp.linear_fc1.layer_norm_weight"
        yield whole(norm, f"{hf}post_attention_layernorm.weight", hidden, layer=layer)
    yield whole("decoder.final_layernorm.weight", "model.norm.weight", hidden)
    if not shape.tied:
        yield whole("output_layer.weight", "lm_head.weight", shape.vocab_rows, hidden)


def extra_state_keys(shape: Qwen2Shape, impl: Literal["local", "te"] = "te") -> list[str]:
    """Keys of the `_extra_state` objects without which Megatron refuses to load. A list for Transformer
    Engine also serves the local implementation, which ignores the surplus. An empty uint8 tensor is a valid
    value for each.
    """
    modules = EXTRA_STATE_MODULES[impl]
    return [f"{LAYERS}{m}._extra_state/shard_{n}_{shape.layers}" for n in range(shape.layers) for m in modules]


# ---------------------------------------------------------------- Hugging Face -> Megatron


@dataclass(frozen=True)
class Entry:
    """One chunk to write: `tensor` is the box at `offset` of the tensor `key` of shape `global_shape`."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


def to_megatron(get: Callable[[str], torch.Tensor], shape: Qwen2Shape, prefix: str = "") -> Iterator[Entry]:
    """The chunks of the whole model, one Hugging Face tensor (one layer's q, k, v together) in memory at a
    time.

    `get(name)` returns the tensor of that Hugging Face name.
    """
    for row in table(shape):
        lead = () if row.layer is None else (row.layer,)
        key = prefix + row.key
        size = row.shape if row.layer is None else (shape.layers, *row.shape)
        rest = (0,) * (len(row.shape) - 1)
        parts = [(part, _fetch(get, part, row)) for part in row.parts]
        if all(len(part.runs) == 1 for part in row.parts):
            for part, tensor in parts:
                start = part.runs[0][0]
                yield Entry(key, size, (*lead, start, *rest), tensor[None] if lead else tensor)
        else:
            fused = parts[0][1].new_empty(row.shape)
            for part, tensor in parts:
                pieces = tensor.split([stop - start for start, stop in part.runs])
                for (start, stop), piece in zip(part.runs, pieces, strict=True):
                    fused[start:stop] = piece
            yield Entry(key, size, (*lead, 0, *rest), fused[None])


def _fetch(get: Callable[[str], torch.Tensor], part: Part, row: Row) -> torch.Tensor:
    tensor = get(part.name).detach()
    expected = (sum(stop - start for start, stop in part.runs), *row.shape[1:])
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in MODEL_DTYPES:
        raise CheckpointError(f"{part.name}: dtype {dtype}, expected {', '.join(MODEL_DTYPES)}")
    found = tuple(tensor.shape)
    if found != expected:
        raise CheckpointError(f"{part.name}: shape {found}, expected {expected}")
    return tensor


# ---------------------------------------------------------------- Megatron -> Hugging Face


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor and where its rows are: the ranges `runs` of `key` (of its entry `layer` if
    stacked).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    key: str
    layer: int | None
    runs: tuple[tuple[int, int], ...]


def plan_hf(
    reader: Reader, shape: Qwen2Shape, prefix: str = "", *, cut_vocab: bool = False, pad_vocab: bool = False
) -> list[HfTensor]:
    """Where each Hugging Face tensor comes from; reads nothing yet.

    `cut_vocab` drops stored vocabulary rows beyond `shape.vocab_rows` (Megatron's padding); `pad_vocab` plans
    `shape.vocab_rows` rows where fewer are stored, whose `runs` then cover the stored ones only. Raises
    CheckpointError if the checkpoint's model tensors are not exactly those of `shape`: missing, of another
    shape or dtype, or unknown.
    """
    stored = {
        key: info
        for key, info in reader.tensors.items()
        if key.startswith(prefix) and (prefix or not key.startswith(OPTIMIZER_PREFIX))
    }
    per_layer = any(re.match(rf"{re.escape(prefix + LAYERS)}\d+\.", key) for key in stored)
    plan, used = [], set()
    for row in table(shape):
        stacked = row.layer is not None and not per_layer
        name = f"{LAYERS}{row.layer}.{row.key.removeprefix(LAYERS)}" if row.layer is not None and per_layer else row.key
        key = prefix + name
        if key not in stored:
            raise CheckpointError(f"{reader.directory}: {key} is missing")
        used.add(key)
        info = stored[key]
        expected = (shape.layers, *row.shape) if stacked else row.shape
        vocabulary = row.is_vocabulary and info.shape[1:] == expected[1:]
        cut = vocabulary and cut_vocab and info.shape[0] > expected[0]
        pad = vocabulary and pad_vocab and info.shape[0] < expected[0]
        if info.shape != expected and not cut and not pad:
            raise CheckpointError(f"{reader.directory}: {key}: shape {info.shape}, expected {expected}")
        if info.dtype not in MODEL_DTYPES:
            raise CheckpointError(f"{reader.directory}: {key}: dtype {info.dtype}, expected {', '.join(MODEL_DTYPES)}")
        for part in row.parts:
            rows = sum(stop - start for start, stop in part.runs)
            layer = row.layer if stacked else None
            runs = ((0, info.shape[0]),) if pad else part.runs
            plan.append(HfTensor(part.name, info.dtype, (rows, *row.shape[1:]), key, layer, runs))
    unknown = sorted(set(stored) - used)
    if unknown:
        raise CheckpointError(f"{reader.directory}: {unknown[0]} is not a tensor of this Qwen2 ({len(unknown)} such)")
    return plan


def to_hf(
    reader: Reader, shape: Qwen2Shape, prefix: str = "", *, cut_vocab: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face name with its tensor in the stored dtype, one in memory at a time. See `plan_hf`."""
    for tensor in plan_hf(reader, shape, prefix, cut_vocab=cut_vocab):
        pieces = [reader.read(tensor.key, start, stop, layer=tensor.layer) for start, stop in tensor.runs]
        yield tensor.name, as_torch(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), tensor.dtype)
