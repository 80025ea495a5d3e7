"""Write Megatron's `torch_dist` checkpoint directories without Megatron and without torch.

`Layout` plans a directory: every chunk gets its place in one shard file before anything is written, so that a caller
can fill it from any number of threads (`tools/convert_hf_to_torch_dist.py`). `Writer` is the simple use of it, one
tensor after another (the embedded engine's checkpoints). Both write the pickles that torch's and Megatron's own
classes would (`torch_archive`); what a directory holds is described in `torch_dist`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safe_pickle import NUMPY_DTYPES
from tools.checkpoint.staging import fsync_path
from tools.checkpoint.torch_archive import Archive, Array, Call, Instance, Named, dumps
from tools.checkpoint.torch_dist import FORMAT, check_tiling

if TYPE_CHECKING:
    import torch

SHARD = "__0_0.distcp"

_METADATA = "torch.distributed.checkpoint.metadata"


def _size(shape: Sequence[int]) -> Call:
    return Named("torch", "Size")(tuple(shape))


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class Slot:
    """The place of one chunk or object: `archive` from byte `start` of the shard on."""

    archive: Archive
    start: int

    @property
    def payload(self) -> int:
        """The byte of the shard at which the elements of the chunk begin."""
        return self.start + self.archive.payloads[0]


@dataclass
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]


class Layout:
    """What a checkpoint directory will hold. `size`: bytes of its shard so far. where: its name in errors."""

    def __init__(self, where: str | os.PathLike):
        self.where = os.fspath(where)
        self.size = 0
        self._tensors: dict[str, _Tensor] = {}
        self._objects: set[str] = set()
        self._ranges: dict[tuple[str, tuple[int, ...] | None], tuple[int, int]] = {}

    def add_tensor(self, key: str, shape: Sequence[int], offset: Sequence[int], chunk: Array) -> Slot:
        """A place for `chunk`, the box at `offset` of the tensor `key` of global shape `shape`."""
        shape, offset = tuple(shape), tuple(offset)
        entry = self._tensors.setdefault(key, _Tensor(chunk.dtype, shape, []))
        if key in self._objects or (entry.dtype, entry.shape) != (chunk.dtype, shape):
            raise CheckpointError(f"{self.where}: {key}: {chunk.dtype} {shape} contradicts an earlier chunk")
        entry.chunks.append((offset, chunk.shape))
        return self._place(key, offset, chunk)

    def add_object(self, key: str, value: Any) -> Slot:
        """A place for an object of constants, containers, arrays; mcore stores each as a list of one."""
        if key in self._tensors or key in self._objects:
            raise CheckpointError(f"{self.where}: {key}: is added twice")
        self._objects.add(key)
        return self._place(key, None, [value])

    def metadata(self) -> bytes:
        """The content of `.metadata`. Raises CheckpointError if the chunks of a tensor do not fill it."""
        state: dict[str, Instance] = {}
        for key, entry in self._tensors.items():
            check_tiling(entry.shape, entry.chunks, f"{self.where}: {key}")
            state[key] = _describe(entry)
        state |= {key: Instance(Named(_METADATA, "BytesStorageMetadata"), {}) for key in sorted(self._objects)}
        storage = {
            _index(key, offset): Instance(
                Named("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
                {"relative_path": SHARD, "offset": start, "length": length},
            )
            for (key, offset), (start, length) in self._ranges.items()
        }
        meta = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
        everything = {
            "state_dict_metadata": state,
            "planner_data": None,
            "storage_data": storage,
            "storage_meta": Instance(Named(_METADATA, "StorageMeta"), meta),
            "version": None,
        }
        return dumps(Instance(Named(_METADATA, "Metadata"), everything))[0]

    def _place(self, key: str, offset: tuple[int, ...] | None, value: Any) -> Slot:
        if (key, offset) in self._ranges:
            raise CheckpointError(f"{self.where}: {key}: chunk {offset} is added twice")
        slot = Slot(Archive(value), self.size)
        self._ranges[key, offset] = self.size, slot.archive.size
        self.size += slot.archive.size
        return slot


def _index(key: str, offset: tuple[int, ...] | None) -> Instance:
    state: dict[str, Any] = {"fqn": key, "index": None}
    if offset is not None:
        state["offset"] = _size(offset)
    return Instance(Named(_METADATA, "MetadataIndex"), state)


def _describe(entry: _Tensor) -> Instance:
    layout = Named("torch.serialization", "_get_layout")("torch.strided")
    contiguous = Named(_METADATA, "_MEM_FORMAT_ENCODING")(0)
    properties = (Named("torch", entry.dtype), layout, False, contiguous, False)
    chunks = [
        Instance(Named(_METADATA, "ChunkStorageMetadata"), {"offsets": _size(offset), "sizes": _size(sizes)})
        for offset, sizes in entry.chunks
    ]
    return Instance(
        Named(_METADATA, "TensorStorageMetadata"),
        {
            "properties": Instance(Named(_METADATA, "TensorProperties"), properties),
            "size": _size(entry.shape),
            "chunks": chunks,
        },
    )


def format_bytes() -> bytes:
    """The content of metadata.json."""
    return json.dumps(FORMAT).encode()


def common_bytes(common: dict[str, Any], where: str | os.PathLike) -> bytes:
    """The content of common.pt: `common` with what Megatron's load_checkpoint asks for beside it.

    Needs keys `args` (argparse.Namespace of constants) and `iteration`: without args, or without the version, Megatron
    dies, or reorders weights of "version 0".
    """
    args = common.get("args")
    if not isinstance(args, argparse.Namespace) or "iteration" not in common:
        raise CheckpointError(f"{where}: common.pt needs `args` (argparse.Namespace) and `iteration`")
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if not hasattr(args, name):
            raise CheckpointError(f"{where}: common.pt needs args.{name}")
    complete = {
        "checkpoint_version": 3.0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"chained_optim_avoid_prefix": True, "singleton_local_shards": False},
    }
    return Archive(plain({**complete, **common}, "common.pt")).to_bytes()


def plain(value: Any, where: str) -> Any:
    """`value` as `torch_archive` takes it: constants, containers, arrays. Tensors of torch become `Array`s."""
    if value is None or isinstance(value, bool | int | float | bytes | str):
        return value
    if isinstance(value, dict):
        return {plain(k, where): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**plain(vars(value), where))
    if type(value) in (list, tuple):
        return type(value)(plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return np.array(value, order="C")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return as_array(value)
    if torch is not None and isinstance(value, torch.dtype):
        return Named("torch", str(value).removeprefix("torch."))
    raise CheckpointError(f"{where}: a {type(value).__name__} cannot be stored in a checkpoint")


def as_array(tensor: torch.Tensor) -> Array:
    """The bits of a torch tensor, on the CPU and contiguous; shares memory where it can."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if dtype not in NUMPY_DTYPES or dtype.startswith("float8"):
        raise CheckpointError(f"a tensor of dtype {dtype} cannot be stored in a checkpoint")
    return Array(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy())


# ---------------------------------------------------------------- one tensor after another


class Writer:
    """Builds one checkpoint directory in a hidden sibling and renames it whole in `finish`.

    Use as a context manager: an error, or leaving without `finish`, leaves nothing behind. What a killed writer left is
    removed by the next one. Memory: one chunk. Equal inputs give equal bytes.
    """

    def __init__(self, directory: str | os.PathLike, *, replace: bool = False):
        self.directory = Path(directory)
        self._replace = replace
        self._layout = Layout(directory)
        self._finished = False

    def __enter__(self) -> Writer:
        parent = self.directory.parent
        if self.directory.exists() and not self._replace:
            raise CheckpointError(f"{self.directory}: exists already")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _clean(parent)
            self._temporary = parent / f".{self.directory.name}.writing-{os.getpid()}"
            self._temporary.mkdir()
            self._lock = os.open(self._temporary, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: then nobody removes anything either
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._shard = open(self._temporary / SHARD, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be written ({error.strerror})") from None
        return self

    def __exit__(self, kind: Any, error: Any, _traceback: Any) -> None:
        with contextlib.suppress(OSError):  # on a full disk close fails too; what counts was synced in finish
            self._shard.close()
        if not self._finished:
            shutil.rmtree(self._temporary, ignore_errors=True)
        os.close(self._lock)
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.directory}: cannot be written ({error.strerror})") from error
        if kind is None and not self._finished:
            raise CheckpointError(f"{self.directory}: left without finish(), nothing was written")

    def add_tensor(
        self,
        key: str,
        tensor: torch.Tensor,
        *,
        global_shape: Sequence[int] | None = None,
        offset: Sequence[int] | None = None,
    ) -> None:
        """Write `tensor` as the box at `offset` of the tensor `key` of shape `global_shape` (default: all of it)."""
        array = as_array(tensor)
        shape = array.shape if global_shape is None else tuple(global_shape)
        at = (0,) * len(shape) if offset is None else tuple(offset)
        self._fill(self._layout.add_tensor(key, shape, at, array))

    def add_object(self, key: str, value: Any) -> None:
        """Write an object of constants, containers, torch tensors and numpy arrays."""
        self._fill(self._layout.add_object(key, plain(value, key)))

    def finish(self, common: dict[str, Any]) -> None:
        """Complete the directory with `common` (see `common_bytes`) and give it its name."""
        metadata = self._layout.metadata()
        os.fsync(self._shard.fileno())
        self._write(".metadata", metadata)
        self._write("common.pt", common_bytes(common, self.directory))
        self._write("metadata.json", format_bytes())
        fsync_path(self._temporary)
        self._publish()
        self._finished = True

    def _fill(self, slot: Slot) -> None:
        for position, piece in slot.archive.pieces():
            view, done = memoryview(piece), 0
            while done < len(view):
                done += os.pwrite(self._shard.fileno(), view[done:], slot.start + position + done)

    def _write(self, name: str, content: bytes) -> None:
        with open(self._temporary / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _publish(self) -> None:
        old = self.directory.with_name(f".{self.directory.name}.replaced")
        if self._replace and self.directory.exists():
            self.directory.rename(old)
        self._temporary.rename(self.directory)
        fsync_path(self.directory.parent)
        shutil.rmtree(old, ignore_errors=True)


def _clean(parent: Path) -> None:
    """Undo what killed writers left in `parent`: a half-written directory whose lock the kernel has released, and one
    set aside by a replacement that did not happen.
    """
    for path in parent.glob(".*.writing-*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
    for path in parent.glob(".*.replaced"):
        original = path.with_name(path.name[1 : -len(".replaced")])
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(original)
