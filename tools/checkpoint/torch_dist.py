"""Megatron's `torch_dist` checkpoint directories: find and read.

    <root>/latest_checkpointed_iteration.txt     "4" or "release"
    <root>/iter_0000004/ or <root>/release/
        metadata.json      names the format
        .metadata          pickle of torch.distributed.checkpoint's Metadata: every tensor's dtype, shape and chunks,
                           and for each chunk the file and byte range that hold it
        __<rank>_<i>.distcp   the chunks, one torch.save archive after another
        common.pt          torch.save archive: args, iteration and whatever is not sharded

Reading needs numpy only, trusts nothing (see `safe_pickle`), touches only the bytes that are asked for, and may be done
from several threads. Writing is `torch_dist_writer`. Layout source:
megatron/core/dist_checkpointing/strategies/torch.py and megatron/training/checkpointing.py of Megatron-LM
core_v0.14.0.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tools.checkpoint import safe_pickle
from tools.checkpoint.crc import combine
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safe_pickle import (
    NUMPY_DTYPES,
    ByteRange,
    Member,
    Record,
    Tensor,
    TorchArchive,
)
from tools.checkpoint.staging import fsync_path

if TYPE_CHECKING:
    import torch

TRACKER = "latest_checkpointed_iteration.txt"
OPTIMIZER_PREFIX = "optimizer."
MODEL_DTYPES = ("bfloat16", "float16", "float32")
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
BLOCK = 1 << 20

Iteration = int | Literal["release"]


# ---------------------------------------------------------------- which directory


@dataclass(frozen=True)
class Location:
    """One checkpoint: `directory` is `root`/iter_XXXXXXX or `root`/release."""

    root: Path
    iteration: Iteration
    directory: Path


def directory_name(iteration: Iteration) -> str:
    return "release" if iteration == "release" else f"iter_{iteration:07d}"


def read_tracker(root: str | os.PathLike) -> Iteration | None:
    """What `root`'s tracker file names; None where there is no such file. Raises CheckpointError if it is
    broken.
    """
    path = Path(root) / TRACKER
    if path.exists() and not path.is_file():  # a named pipe would block for ever
        raise CheckpointError(f"{path}: not a regular file")
    try:
        text = path.read_text(encoding="ascii", errors="replace")[:100].strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if text == "release":
        return "release"
    if re.fullmatch(r"[0-9]{1,18}", text) and int(text) > 0:
        return int(text)
    raise CheckpointError(f"{path}: expected a positive iteration or 'release', found {text!r}")


def write_tracker(root: str | os.PathLike, value: Iteration) -> None:
    """Make `root` name `value`; a reader sees the old file or the new one, also after a power cut."""
    if value != "release" and (type(value) is not int or value <= 0):
        raise CheckpointError(f"{Path(root) / TRACKER}: expected a positive iteration or 'release', found {value!r}")
    temporary = Path(root) / f".{TRACKER}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(str(value))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, Path(root) / TRACKER)
        fsync_path(Path(root))
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{Path(root) / TRACKER}: cannot be written ({error.strerror})") from None


def resolve(path: str | os.PathLike, ckpt_step: int | None = None) -> Location:
    """The checkpoint that `path` means: a root (its tracker decides, or `ckpt_step`), an iter_XXXXXXX or a
    release directory. Raises CheckpointError, in one line, for anything else.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    named = re.fullmatch(r"iter_([0-9]{7,})|release", path.absolute().name)
    if named and not (path / TRACKER).exists():
        if ckpt_step is not None:
            raise CheckpointError(
                f"{path}: a checkpoint step goes with the root of the checkpoints, not with one of them"
            )
        path = path.absolute()
        location = Location(path.parent, int(named[1]) if named[1] else "release", path)
    else:
        iteration: Iteration | None = ckpt_step if ckpt_step is not None else read_tracker(path)
        if iteration is None:
            raise CheckpointError(f"{path}: expected {TRACKER} in it, or the name iter_XXXXXXX or release")
        location = Location(path, iteration, path / directory_name(iteration))
    if not (location.directory / ".metadata").is_file():
        raise CheckpointError(f"{location.directory}: not a torch_dist checkpoint (no .metadata in it)")
    return location


# ---------------------------------------------------------------- what is in it


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the byte range of its torch.save archive."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class _Range:
    file: str
    position: int
    length: int


def check_tiling(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]], where: str) -> None:
    """Raise CheckpointError unless the (offset, size) boxes are the cells of one grid and fill `shape`
    exactly.
    """
    cells = 1
    for axis, size in enumerate(shape):
        cuts = sorted({offset[axis] for offset, _ in boxes} | {size})
        following = dict(zip(cuts, cuts[1:], strict=False))
        cells *= len(cuts) - 1
        if cuts[0] != 0 or any(following.get(o[axis]) != o[axis] + s[axis] for o, s in boxes):
            raise CheckpointError(f"{where}: its chunks do not fill the shape {tuple(shape)} along axis {axis}")
    if len(boxes) != cells or len({tuple(offset) for offset, _ in boxes}) != cells:
        raise CheckpointError(f"{where}: {len(boxes)} chunks, expected {cells} to fill the shape {tuple(shape)}")


class _Metadata:
    """`.metadata`, checked entry by entry."""

    def __init__(self, path: Path):
        self.path = path
        root = safe_pickle.load(path)
        entries = getattr(root, "state_dict_metadata", None)
        storage = getattr(root, "storage_data", None)
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise self.error("is not the metadata of a torch.distributed.checkpoint")
        self.ranges: dict[tuple[str, tuple[int, ...]], _Range] = {}
        for index, info in storage.items():
            self._add_range(index, info)
        self.tensors: dict[str, TensorInfo] = {}
        self.objects: dict[str, _Range] = {}
        for key, entry in entries.items():
            kind = entry.type_name if isinstance(entry, Record) else None
            if isinstance(key, str) and kind == "TensorStorageMetadata":
                self.tensors[key] = self._tensor(key, entry)
            elif isinstance(key, str) and kind == "BytesStorageMetadata":
                self.objects[key] = self._take(key, ())
            else:
                raise self.error(f"has an entry of an unknown kind: {str(key)[:200]!r}")
        if self.ranges:
            raise self.error(f"stores {next(iter(self.ranges))[0]!r} without describing it")

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def _ints(self, value: Any, what: str) -> tuple[int, ...]:
        if not isinstance(value, tuple | list) or not all(type(n) is int and 0 <= n < 2**48 for n in value):
            raise self.error(f"{what} is not a list of sizes")
        return tuple(value)

    def _add_range(self, index: Any, info: Any) -> None:
        key, file = getattr(index, "fqn", None), getattr(info, "relative_path", None)
        if not isinstance(key, str) or not isinstance(file, str):
            raise self.error("has a storage entry without a name or a file")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", file):
            raise self.error(f"{key}: expected the name of a file in the same directory, found {file[:200]!r}")
        if getattr(info, "transform_descriptors", None):
            raise self.error(f"{key}: is stored compressed or encrypted, which is not supported")
        offset = self._ints(getattr(index, "offset", None) or (), f"{key}: the offset of a chunk")
        position, length = self._ints(
            (getattr(info, "offset", None), getattr(info, "length", None)), f"{key}: its range"
        )
        if (key, offset) in self.ranges:
            raise self.error(f"{key}: chunk {offset} is stored twice")
        self.ranges[key, offset] = _Range(file, position, length)

    def _take(self, key: str, offset: tuple[int, ...]) -> _Range:
        try:
            return self.ranges.pop((key, offset))
        except KeyError:
            raise self.error(f"{key}: no storage for its chunk {offset}") from None

    def _tensor(self, key: str, entry: Record) -> TensorInfo:
        properties = getattr(entry, "properties", None)
        state = getattr(properties, "state", None)
        dtype = state[0] if isinstance(state, tuple) and state else getattr(properties, "dtype", None)
        if not isinstance(dtype, str):
            raise self.error(f"{key}: no dtype")
        shape = self._ints(getattr(entry, "size", None), f"{key}: its shape")
        chunks = []
        described = getattr(entry, "chunks", None)
        for chunk in described if isinstance(described, list) else ():
            offset = self._ints(getattr(chunk, "offsets", None), f"{key}: the offset of a chunk")
            sizes = self._ints(getattr(chunk, "sizes", None), f"{key}: the shape of a chunk")
            if not len(offset) == len(sizes) == len(shape):
                raise self.error(f"{key}: chunk {offset} + {sizes} in a tensor of shape {shape}")
            stored = self._take(key, offset)
            # The archive holds the elements raw, so a longer claim than the range is a lie; it also caps
            # memory.
            if dtype in NUMPY_DTYPES and math.prod(sizes) * NUMPY_DTYPES[dtype].itemsize > stored.length:
                raise self.error(f"{key}: chunk {sizes} of {dtype} does not fit in the {stored.length} bytes stored")
            chunks.append(Chunk(offset, sizes, stored.file, stored.position, stored.length))
        return TensorInfo(dtype, shape, tuple(chunks))


# ---------------------------------------------------------------- reading


class _Payload:
    """The raw elements of one chunk. The archive's CRC covers all of them, so it is computed along a read
    that goes from front to back, completed by `finish`, and taken in a pass of its own before a read that
    jumps.
    """

    def __init__(self, member: Member, start: int):
        self.member, self.start = member, start
        self.next = 0
        self.crc = 0
        self.verified = False
        self.lock = threading.Lock()

    def read_into(self, position: int, view: memoryview) -> int:
        """Fill `view` from byte `position` of the elements on; returns its CRC-32."""
        position += self.start
        with self.lock:
            if not self.verified and position != self.next:
                self._finish()
            self.member.source.read_into(self.member.position + position, view)
            crc = zlib.crc32(view)
            if not self.verified:
                self._advance(crc, len(view))
        return crc

    def finish(self) -> None:
        with self.lock:
            self._finish()

    def _finish(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        while not self.verified:
            view = buffer[: min(BLOCK, self.member.size - self.next)]
            self.member.source.read_into(self.member.position + self.next, view)
            self._advance(zlib.crc32(view), len(view))

    def _advance(self, crc: int, length: int) -> None:
        self.crc = combine(self.crc, crc, length)
        self.next += length
        if self.next >= self.member.size:
            self.member.check(self.crc)
            self.verified = True


class Reader:
    """Reads one checkpoint directory. Use as a context manager: leaving it completes the CRC of chunks that
    were read in part, so data handed out is known to be intact once the block has ended without an error.

    `tensors` lists every tensor, optimizer states included; `objects` the keys of pickled objects.
    Raises CheckpointError, in one line naming the file or key, for anything damaged or dishonest.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self._check_format()
        metadata = _Metadata(self.directory / ".metadata")
        self.tensors: dict[str, TensorInfo] = metadata.tensors
        self._objects = metadata.objects
        self._files: dict[str, int] = {}
        self._payloads: dict[Chunk, _Payload] = {}
        self._tiled: set[str] = set()
        self._by_layer: dict[tuple[str, int], tuple[Chunk, ...]] = {}
        self._lock = threading.Lock()
        self._check_ranges()

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(self._objects)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.verify()
        finally:
            self.close()

    def verify(self) -> None:
        """Complete the CRC of every chunk that has been read in part."""
        for payload in self._payloads.values():
            if payload.next:
                payload.finish()

    def verify_read(self, key: str, layer: int | None) -> None:
        """`verify` for what has been read of `key`, or of its entry `layer`."""
        for chunk in self._chunks(key, layer):
            payload = self._payloads.get(chunk)
            if payload is not None and payload.next:
                payload.finish()

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def common(self) -> dict[str, Any]:
        """common.pt as inert data; `["args"]` has the Megatron arguments as attributes."""
        path = self.directory / "common.pt"
        common = safe_pickle.load(path)
        if not isinstance(common, dict):
            raise CheckpointError(f"{path}: expected a dictionary, found {type(common).__name__}")
        return common

    def read_object(self, key: str) -> Any:
        """The object under `key`, inert."""
        if key not in self._objects:
            raise CheckpointError(f"{self.directory}: no object {key!r} in this checkpoint")
        stored = self._objects[key]
        value = TorchArchive(self._range(stored, key)).load()
        if not isinstance(value, list) or len(value) != 1:  # mcore stores each object as a list of one
            raise CheckpointError(f"{self.directory / stored.file}: {key}: expected a list of one object")
        return value[0]

    def read(
        self, key: str, start: int | None = None, stop: int | None = None, *, layer: int | None = None
    ) -> np.ndarray:
        """Rows [start, stop) along axis 0 of `key`, or of its entry `layer` when it is a stack of layers.

        Returns a new array in the element type of `safe_pickle.NUMPY_DTYPES` (bfloat16 as its bits in
        uint16).
        """
        info, shape = self._shape(key, layer)
        scalar = shape == ()
        shape = shape or (1,)
        start, stop = 0 if start is None else start, shape[0] if stop is None else stop
        out = np.empty((max(0, stop - start), *shape[1:]), NUMPY_DTYPES[info.dtype])
        self.read_into(key, start, out, layer=layer)
        return out.reshape(()) if scalar else out

    def read_into(self, key: str, start: int, out: np.ndarray, *, layer: int | None = None) -> int | None:
        """As `read`, the rows from `start` on into `out`: C-contiguous, of the tensor's row shape and element type.

        Returns the CRC-32 of `out` if one chunk gave all of it, and None otherwise.
        """
        info, shape = self._shape(key, layer)
        shape = shape or (1,)
        if not 0 <= start <= start + len(out) <= shape[0] or out.shape[1:] != shape[1:]:
            raise CheckpointError(f"{self.directory}: {key}: rows {start}:{start + len(out)} of the shape {shape}")
        crcs = [self._copy(key, info.dtype, chunk, layer, start, out) for chunk in self._chunks(key, layer)]
        used = [crc for crc in crcs if crc is not None]
        return used[0] if len(used) == 1 and used[0] >= 0 else None

    # ---- checks

    def _check_format(self) -> None:
        path = self.directory / "metadata.json"
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        try:
            found = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path}: not JSON") from None
        if not isinstance(found, dict) or any(found.get(key) != value for key, value in FORMAT.items()):
            raise CheckpointError(f"{path}: expected {FORMAT}, found {str(found)[:200]}")

    def _check_ranges(self) -> None:
        """Every range lies in its file and no two overlap: the files' sizes then bound what can be read."""
        ranges = [(r.file, r.position, r.length, key) for key, r in self._objects.items()]
        for key, info in self.tensors.items():
            ranges += [(c.file, c.position, c.length, key) for c in info.chunks]
        file, end, size = "", 0, 0
        for next_file, position, length, key in sorted(ranges):
            if next_file != file:
                file, end = next_file, 0
                if not (self.directory / file).is_file():
                    raise CheckpointError(f"{self.directory / file}: shard is missing ({key} is in it)")
                size = (self.directory / file).stat().st_size
            if position < end:
                raise CheckpointError(f"{self.directory / '.metadata'}: {key}: its range overlaps another in {file}")
            end = position + length
            if end > size:
                raise CheckpointError(
                    f"{self.directory / file}: {key} ends at byte {end}, but the file has {size} (truncated shard?)"
                )

    def _shape(self, key: str, layer: int | None) -> tuple[TensorInfo, tuple[int, ...]]:
        info = self._checked(key)
        if layer is None:
            return info, info.shape
        if not info.shape or not 0 <= layer < info.shape[0]:
            raise CheckpointError(f"{self.directory}: {key}: no layer {layer} in the shape {info.shape}")
        return info, info.shape[1:]

    def _chunks(self, key: str, layer: int | None) -> tuple[Chunk, ...]:
        """The chunks that hold something of `key`, or of its entry `layer`."""
        if layer is None:
            return self.tensors[key].chunks
        if (key, layer) not in self._by_layer:
            chunks = self.tensors[key].chunks
            here = tuple(c for c in chunks if c.offset[0] <= layer < c.offset[0] + c.shape[0])
            self._by_layer[key, layer] = here
        return self._by_layer[key, layer]

    def _checked(self, key: str) -> TensorInfo:
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(f"{self.directory}: no tensor {key!r} in this checkpoint")
        if key not in self._tiled:
            allowed = NUMPY_DTYPES if key.startswith(OPTIMIZER_PREFIX) else MODEL_DTYPES
            if info.dtype not in allowed:
                raise CheckpointError(f"{self.directory}: {key}: dtype {info.dtype}, expected {', '.join(allowed)}")
            check_tiling(info.shape, [(c.offset, c.shape) for c in info.chunks], f"{self.directory}: {key}")
            self._tiled.add(key)
        return info

    # ---- bytes

    def _range(self, stored: _Range | Chunk, key: str) -> ByteRange:
        path = self.directory / stored.file
        with self._lock:
            if stored.file not in self._files:
                try:
                    self._files[stored.file] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        return ByteRange(self._files[stored.file], stored.position, stored.length, f"{path}: {key}")

    def _payload(self, key: str, dtype: str, chunk: Chunk) -> _Payload:
        if chunk not in self._payloads:
            source = self._range(chunk, key)
            archive = TorchArchive(source)
            tensor = archive.load()
            if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (dtype, chunk.shape):
                found = f"{tensor.dtype} {tensor.shape}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise CheckpointError(f"{source.where}: .metadata says {dtype} {chunk.shape}, the shard holds {found}")
            if not tensor.contiguous:
                raise CheckpointError(f"{source.where}: chunk {chunk.offset} is not stored contiguously")
            member = archive.member(f"data/{tensor.storage.key}")
            payload = _Payload(member, tensor.offset * NUMPY_DTYPES[dtype].itemsize)
            return self._payloads.setdefault(chunk, payload)  # of two threads, one wins
        return self._payloads[chunk]

    def _copy(self, key: str, dtype: str, chunk: Chunk, layer: int | None, start: int, out: np.ndarray) -> int | None:
        """Copy what `chunk` holds of the rows [start, start + len(out)) into `out`.

        Returns None if that is nothing, the CRC-32 of `out` if it is all of it, -1 if it is a part.
        """
        offset, shape = chunk.offset, chunk.shape
        index = 0
        if layer is not None:
            index = layer - offset[0]
            offset, shape = offset[1:], shape[1:]
        offset, shape = offset or (0,), shape or (1,)
        first, last = max(start, offset[0]), min(start + len(out), offset[0] + shape[0])
        box = (
            slice(first - start, last - start),
            *(slice(o, o + s) for o, s in zip(offset[1:], shape[1:], strict=True)),
        )
        if first >= last or not out[box].size:
            return None
        row = math.prod(shape[1:]) * out.itemsize
        position = (index * shape[0] + first - offset[0]) * row
        whole_rows = shape[1:] == out.shape[1:]
        target = out[box] if whole_rows else np.empty((last - first, *shape[1:]), out.dtype)
        view = memoryview(target.reshape(-1).view(np.uint8))
        crc = self._payload(key, dtype, chunk).read_into(position, view)
        if not whole_rows:
            out[box] = target
        return crc if target.size == out.size and whole_rows else -1


def as_torch(value: np.ndarray, dtype: str) -> torch.Tensor:
    """A torch tensor of an array whose bits are torch dtype `dtype`; shares memory."""
    import torch

    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(getattr(torch, dtype)).reshape(value.shape)
