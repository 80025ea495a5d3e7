"""Hugging Face checkpoint directories: safetensors files by byte range, their index, and everything beside the weights.

A safetensors file is 8 bytes of header length, a JSON header with dtype, shape and byte range of every tensor, and
the raw little-endian elements. The safetensors library checks each header (no holes, no overlap, sizes that fit the
file); the ranges are then read straight from the file, because the library hands out whole tensors only, and no
bfloat16 in numpy.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tools.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = {"format": "pt"}  # loaders that look for it refuse files without

# safetensors name -> torch name
DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
NAMES = {torch: name for name, torch in DTYPES.items()}
ITEMSIZE = {
    name: {"64": 8, "32": 4, "16": 2}.get(re.sub(r"\D+", "", name) if not name.startswith("F8") else "8", 1)
    for name in DTYPES
}
# Weights in another format: of no use beside safetensors, and loaders may prefer them.
OTHER_WEIGHTS = re.compile(
    r".*\.(h5|msgpack|pt|pth|ot|gguf|onnx|onnx_data)(\.index\.json)?"
    r"|.*(model|consolidated).*\.bin(\.index\.json)?"
)


@dataclass(frozen=True)
class Entry:
    """A stored tensor: safetensors dtype name, shape, and `nbytes` bytes at `offset` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


class HfReader:
    """The tensors of a Hugging Face directory, by byte range and from any thread. Use as a context manager.

    tensors: name -> Entry, in file order. files: the weight files, in order. Raises CheckpointError, in one line naming
    the file, for a missing or truncated shard, a damaged header, or an index that does not tell the truth.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        weight_map = _read_index(self.directory)
        self.files: list[str] = sorted(set(weight_map.values())) if weight_map is not None else [_only(self.directory)]
        self.tensors: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self.files:
            entries, self.metadata[file] = _read_file(self.directory / file)
            for entry in entries:
                if entry.name in self.tensors:
                    where = self.tensors[entry.name].file
                    raise CheckpointError(f"{self.directory / file}: {entry.name} is in {where} as well")
                self.tensors[entry.name] = entry
        if weight_map is not None:
            self._check_index(weight_map)
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def entry(self, name: str) -> Entry:
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        return self.tensors[name]

    def read_into(self, entry: Entry, position: int, view: memoryview) -> None:
        """Fill `view` with the bytes of `entry` from byte `position` on."""
        path = self.directory / entry.file
        if position < 0 or position + len(view) > entry.nbytes:
            raise CheckpointError(f"{path}: {entry.name}: bytes {position}+{len(view)} lie outside {entry.nbytes}")
        done = 0
        try:
            fd = self._fd(entry.file)
            while done < len(view):
                count = os.preadv(fd, [view[done:]], entry.offset + position + done)
                if count <= 0:
                    raise CheckpointError(f"{path}: the file ends early (truncated)")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    def sources(self) -> list[list[Any]]:
        """Name, size and time of every weight file: what a resumed run must find unchanged."""
        found = []
        for file in self.files:
            status = (self.directory / file).stat()
            found.append([file, status.st_size, status.st_mtime_ns])
        return found

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                self._fds[file] = os.open(self.directory / file, os.O_RDONLY)
            return self._fds[file]

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        path = self.directory / INDEX
        for name, file in weight_map.items():
            found = self.tensors.get(name)
            if found is None or found.file != file:
                where = f"it is in {found.file}" if found else "no file has it"
                raise CheckpointError(f"{path}: says that {name} is in {file}, but {where}")
        for name, entry in self.tensors.items():
            if name not in weight_map:
                raise CheckpointError(f"{path}: does not list {name}, which is in {entry.file}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would block for ever
            raise CheckpointError(f"{path}: not a regular file")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not JSON") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors", file):
            raise CheckpointError(f"{path}: {name}: expected the name of a file beside it, found {str(file)[:200]!r}")
    return weight_map


def _only(directory: Path) -> str:
    """The one weight file of a directory without an index."""
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: expected *.safetensors in it, found none")
    if len(files) > 1:
        raise CheckpointError(f"{directory}: {len(files)} safetensors files, but no {INDEX} says what belongs together")
    return files[0]


def _read_file(path: Path) -> tuple[list[Entry], dict[str, str]]:
    if not path.is_file():  # a named pipe would block for ever
        raise CheckpointError(f"{path}: shard is missing")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError, struct.error):
        raise CheckpointError(f"{path}: not a complete safetensors file (damaged header)") from None
    header.pop("__metadata__", None)
    entries = []
    for name, tensor in header.items():
        start, stop = tensor["data_offsets"]
        dtype, shape = tensor["dtype"], tuple(tensor["shape"])
        # Elements of less than a byte (F4 and the like) have no place in these checkpoints.
        if dtype not in DTYPES or math.prod(shape) * ITEMSIZE[dtype] != stop - start:
            raise CheckpointError(f"{path}: {name}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
        entries.append(Entry(name, dtype, shape, path.name, 8 + length + start, stop - start))
    return sorted(entries, key=lambda entry: entry.offset), metadata


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Plan:
    """A safetensors file to be filled: `header` (with its length) at byte 0, tensors at `offsets`, `size` bytes in
    all.
    """

    header: bytes
    offsets: dict[str, int]
    size: int


def plan_file(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] = METADATA) -> Plan:
    """Lay out (name, safetensors dtype, shape) tensors in the given order, wide elements first so that each is
    aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor[1]])
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    offsets = {name: base + header[name]["data_offsets"][0] for name, _, _ in ordered}
    return Plan(struct.pack("<Q", len(text)) + text, offsets, base + position)


def shard(tensors: Iterable[tuple[str, str, tuple[int, ...]]], limit: int) -> dict[str, list]:
    """Distribute (name, dtype, shape) tensors over files of at most `limit` bytes, in order: file name -> its tensors.

    A tensor larger than the limit gets a file of its own.
    """
    overhead = 256  # the header's length, metadata and padding
    shards: list[list] = [[]]
    size = overhead
    for name, dtype, shape in tensors:
        entry = math.prod(shape) * ITEMSIZE[dtype] + len(json.dumps(name)) + 96 + 22 * len(shape)
        if shards[-1] and size + entry > limit:
            shards.append([])
            size = overhead
        shards[-1].append((name, dtype, shape))
        size += entry
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def index(files: Mapping[str, Iterable[tuple[str, str, tuple[int, ...]]]]) -> dict[str, Any]:
    """The content of model.safetensors.index.json for (name, dtype, shape) tensors by file."""
    weight_map = {name: file for file, tensors in files.items() for name, _, _ in tensors}
    total = sum(math.prod(shape) * ITEMSIZE[dtype] for tensors in files.values() for _, dtype, shape in tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def companions(directory: Path) -> list[Path]:
    """The files beside the weights, of whatever name: configuration, tokenizer, chat template, code, licence."""
    try:
        found = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from None
    return [
        path
        for path in found
        if not re.search(r"\.safetensors(\.index\.json)?$", path.name) and not OTHER_WEIGHTS.fullmatch(path.name)
    ]
