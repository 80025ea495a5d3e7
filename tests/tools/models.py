"""Small Hugging Face models for the tests of the commands: real files, random bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tools.checkpoint import qwen2_layout, safetensors_io
from tools.checkpoint.qwen2_layout import Qwen2Shape

TINY = Qwen2Shape(layers=2, hidden=64, ffn=160, heads=4, groups=2, head_dim=16, vocab_rows=200, tied=False)
# Every linear weight is whole blocks: what transformers' FP8 loader asks for.
BLOCKS = Qwen2Shape(layers=2, hidden=256, ffn=384, heads=2, groups=1, head_dim=128, vocab_rows=300, tied=True)


def config_of(shape: Qwen2Shape, **changes: Any) -> dict[str, Any]:
    """A config.json as Qwen2.5 ships it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 64,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.groups,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": shape.vocab_rows,
        **({} if shape.head_dim * shape.heads == shape.hidden else {"head_dim": shape.head_dim}),
        **changes,
    }


def sizes(shape: Qwen2Shape) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor."""
    found: dict[str, tuple[int, ...]] = {}
    for row in qwen2_layout.table(shape):
        for part in row.parts:
            found[part.name] = (sum(stop - start for start, stop in part.runs), *row.shape[1:])
    return found


def weights(shape: Qwen2Shape, seed: int, dtype: str = "BF16") -> dict[str, np.ndarray]:
    """Finite numbers of the size of real weights, as the bits of safetensors `dtype`."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, size in sizes(shape).items():
        values = rng.normal(0, 0.02, size) * np.exp(rng.normal(0, 0.5, (size[0],) + (1,) * (len(size) - 1)))
        values = values.astype(np.float32) + (1 if "norm" in name else 0)
        if dtype == "BF16":
            made[name] = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            made[name] = values.astype(np.float16).view(np.uint16) if dtype == "F16" else values.view(np.uint32)
    return made


def save(
    folder: Path,
    shape: Qwen2Shape,
    seed: int = 0,
    *,
    dtype: str = "BF16",
    tensors: dict[str, np.ndarray] | None = None,
    config: dict[str, Any] | None = None,
    shard_bytes: int | None = None,
) -> Path:
    """A Hugging Face directory: one file without an index, as the small Qwen2.5 are, or shards of `shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(shape, seed, dtype) if tensors is None else tensors
    listed = [(name, dtype, array.shape) for name, array in tensors.items()]
    files = safetensors_io.shard(listed, shard_bytes or 1 << 40)
    for file, content in files.items():
        plan = safetensors_io.plan_file(content)
        data = bytearray(plan.size)
        data[: len(plan.header)] = plan.header
        for name, _, _ in content:
            raw = tensors[name].tobytes()
            data[plan.offsets[name] : plan.offsets[name] + len(raw)] = raw
        (folder / file).write_bytes(data)
    if shard_bytes:
        (folder / safetensors_io.INDEX).write_text(json.dumps(safetensors_io.index(files)))
    (folder / "config.json").write_text(json.dumps(config or config_of(shape), indent=2))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'{{"a": "{name}"}}\n')
    return folder


def load(folder: Path) -> dict[str, bytes]:
    """Raw bytes of every tensor of a Hugging Face directory, by name, with its dtype and shape in front."""
    found = {}
    with safetensors_io.HfReader(folder) as reader:
        for name, entry in reader.tensors.items():
            data = bytearray(entry.nbytes)
            reader.read_into(entry, 0, memoryview(data))
            found[name] = f"{entry.dtype} {entry.shape} ".encode() + data
    return found


def raw(folder: Path, name: str, dtype: type) -> np.ndarray:
    """One tensor as an array of `dtype`."""
    with safetensors_io.HfReader(folder) as reader:
        entry = reader.entry(name)
        data = bytearray(entry.nbytes)
        reader.read_into(entry, 0, memoryview(data))
        return np.frombuffer(bytes(data), dtype).reshape(entry.shape)
