"""Any checkpoint of a dense Qwen2 as Hugging Face tensors, read a few rows at a time: what `verify_checkpoint`
compares.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.checkpoint import torch_dist
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.fp8_cast import BLOCK, SCALE_SUFFIX, scale_shape
from tools.checkpoint.qwen2_layout import HfTensor, Qwen2Shape, plan_hf
from tools.checkpoint.safe_pickle import NUMPY_DTYPES
from tools.checkpoint.safetensors_io import DTYPES, Entry, HfReader, read_json

COMPARABLE = ("bfloat16", "float16", "float32", "float8_e4m3fn")


@dataclass(frozen=True)
class Info:
    """torch dtype and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


class Source(ABC):
    """A checkpoint. tensors: Hugging Face name -> Info; scales of FP8 weights are not listed, `scales` reads them.

    padded: whether vocabulary rows beyond the tokenizer's may be there (Megatron's padding). notes: what was left out.
    """

    kind: str
    tensors: dict[str, Info]
    padded = False

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as (rows, ...) raw elements of `safe_pickle.NUMPY_DTYPES`."""

    @abstractmethod
    def scales(self, name: str) -> np.ndarray:
        """The float32 scales of an FP8 weight, one per block; only FP8 weights have any."""


class HfSource(Source):
    """A Hugging Face directory, BF16 or block FP8."""

    def __init__(self, reader: HfReader):
        super().__init__()
        self._reader = reader
        config = read_json(reader.directory / "config.json")
        entries = dict(reader.tensors)
        self._scales = {name: entries.pop(name) for name in reader.tensors if name.endswith(SCALE_SUFFIX)}
        for name in reader.tensors:
            computed = name.endswith(".rotary_emb.inv_freq")
            if computed or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                del entries[name]
                self.notes.append(f"{reader.directory}: {name} is not compared, the model computes it")
        self.tensors = {name: self._info(entry) for name, entry in entries.items()}
        for name in self._scales:
            if name.removesuffix(SCALE_SUFFIX) not in self.tensors:
                raise CheckpointError(f"{reader.directory}: {name} has no weight beside it")
        self.kind = "HF block FP8" if self._scales else "HF"

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        entry, info = self._reader.entry(name), self.tensors[name]
        element = NUMPY_DTYPES[info.dtype]
        rows = np.empty((stop - start, *info.shape[1:]), element)
        width = math.prod(info.shape[1:]) * element.itemsize
        self._reader.read_into(entry, start * width, memoryview(rows.reshape(-1).view(np.uint8)))
        return rows

    def scales(self, name: str) -> np.ndarray:
        entry = self._scales[name + SCALE_SUFFIX]
        values = np.empty(entry.shape, np.float32)
        self._reader.read_into(entry, 0, memoryview(values.reshape(-1).view(np.uint8)))
        return values

    def _info(self, entry: Entry) -> Info:
        where = f"{self._reader.directory / entry.file}: {entry.name}"
        dtype = DTYPES[entry.dtype]
        if dtype not in COMPARABLE:
            raise CheckpointError(f"{where}: dtype {entry.dtype}, expected BF16, F16, F32 or F8_E4M3")
        if entry.dtype == "F8_E4M3":
            scale = self._scales.get(entry.name + SCALE_SUFFIX)
            if len(entry.shape) != 2 or scale is None:
                raise CheckpointError(f"{where}: F8_E4M3 without {entry.name + SCALE_SUFFIX}")
            expected = scale_shape(entry.shape)
            if scale.dtype != "F32" or scale.shape != expected:
                found = f"{scale.dtype} {scale.shape}"
                raise CheckpointError(f"{where}{SCALE_SUFFIX}: expected F32 {expected}, found {found}")
        return Info(dtype, entry.shape)


class TorchDistSource(Source):
    """The model weights of a Megatron checkpoint."""

    kind = "torch_dist"
    padded = True

    def __init__(self, reader: torch_dist.Reader):
        super().__init__()
        self._reader = reader
        args = reader.common().get("args")
        try:
            shape = Qwen2Shape.from_megatron_args(args)
        except CheckpointError as error:
            raise CheckpointError(f"{reader.directory / 'common.pt'}: {error}") from None
        table = reader.tensors.get("embedding.word_embeddings.weight")
        if table is not None and table.shape:
            shape = replace(shape, vocab_rows=table.shape[0])
        self._plan: dict[str, HfTensor] = {tensor.name: tensor for tensor in plan_hf(reader, shape)}
        self.tensors = {name: Info(tensor.dtype, tensor.shape) for name, tensor in self._plan.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._plan[name]
        rows = np.empty((stop - start, *tensor.shape[1:]), NUMPY_DTYPES[tensor.dtype])
        position = 0
        for first, last in tensor.runs:
            low, high = max(start, position), min(stop, position + last - first)
            if low < high:
                into = rows[low - start : high - start]
                self._reader.read_into(tensor.key, first + low - position, into, layer=tensor.layer)
            position += last - first
        return rows

    def scales(self, name: str) -> np.ndarray:
        raise CheckpointError(f"{self._reader.directory}: {name} has no scales")


def open_source(path: Path, stack: contextlib.ExitStack) -> Source:
    """The checkpoint at `path`: a Hugging Face directory, or what `torch_dist.resolve` takes."""
    if path.is_dir() and any(path.glob("*.safetensors*")):
        return HfSource(stack.enter_context(HfReader(path)))
    return TorchDistSource(stack.enter_context(torch_dist.Reader(torch_dist.resolve(path).directory)))


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw elements of bfloat16, float16 or float32 as float32, exactly."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


def _e4m3_values() -> np.ndarray:
    """The number that each E4M3 byte stands for (OCP 8-bit floating point, E4M3): bias 7, no infinity, NaN is 0x7f."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


E4M3_VALUES = _e4m3_values()


def spread(scale_inv: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One number for each element of a matrix of `shape` from one for each of its blocks."""
    rows = np.repeat(scale_inv, BLOCK, axis=0)[: shape[0]]
    return np.repeat(rows, BLOCK, axis=1)[:, : shape[1]]


def dequantize(codes: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """(rows, columns) float32: code * scale_inv, for whole rows of blocks."""
    return E4M3_VALUES[codes] * spread(scale_inv, codes.shape)


def describe(source: Source, path: Path) -> dict[str, Any]:
    return {"path": str(path), "kind": source.kind, "tensors": len(source.tensors)}
