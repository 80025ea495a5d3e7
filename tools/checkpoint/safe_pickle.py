"""Read pickles and torch.save archives of unknown origin, with numpy alone.

A pickle is a program for a small stack machine, and the standard unpickler lets that program import and call
anything. The machine below has the same stack but no import and no call: a global becomes an entry of the
table `GLOBALS` or is refused, and "calling" it builds a `Record` (attributes only), a `Tensor`, or a string.
The opcodes are decoded by `pickletools.genops`, which never allocates more than the input holds.

torch.save writes a ZIP of STORED members: `<name>/data.pkl` plus the raw little-endian bytes of every storage
in `<name>/data/<key>`. `TorchArchive` reads it from any byte range of a file and checks every CRC that it
relies on.

The known globals are those found in checkpoints of Megatron-LM core_v0.14.0, those that it declares safe
itself (megatron/core/safe_globals.py), and the classes of torch.distributed.checkpoint's metadata.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.checkpoint.errors import CheckpointError, shown

# Raw element type of each torch dtype in numpy. bfloat16 and float8 have none, so their bits are kept.
NUMPY_DTYPES = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "bool": np.dtype("?"),
}
STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    # float8 has no typed storage class of its own: torch.save writes UntypedStorage there
    "UntypedStorage": "uint8",
}


class Record:
    """Stand-in for an instance: its attributes and nothing else."""

    def __init__(self, type_name: str, args: tuple = ()):
        self._type_name = type_name
        self._args = args

    @property
    def type_name(self) -> str:
        return self._type_name

    def __repr__(self) -> str:
        return f"<inert {self._type_name}>"


_RESERVED = {"_type_name", "_args"}


class Label(str):
    """Stand-in for a constant: a dtype ("bfloat16") or an enum member ("AttnBackend(5)")."""


@dataclass(frozen=True)
class Storage:
    """Raw bytes in an archive: `numel` elements of `dtype` under the name `key`."""

    archive: TorchArchive
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that is described but not loaded; `stride` and `offset` count elements of `storage`."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and step != expected:
                return False
            expected *= size
        return True

    def numpy(self) -> np.ndarray:
        """A read-only array of `shape`, in the element type of NUMPY_DTYPES. Checks the CRC."""
        raw = self.storage.archive.member(f"data/{self.storage.key}").read()
        flat = np.frombuffer(raw, NUMPY_DTYPES[self.dtype])
        strides = tuple(step * flat.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


class NumpyArray:
    """A pickled numpy array, with the same three members as `Tensor`."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    _data: bytes = b""

    def numpy(self) -> np.ndarray:
        return np.frombuffer(self._data, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class _Global:
    """An allowed global on the stack; `build` makes its stand-in from the arguments the pickle passes."""

    name: str
    build: Callable[..., Any]


# ---------------------------------------------------------------- stand-ins


def _dims(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(n) is int and 0 <= n < 2**48 for n in value):
        raise ValueError(f"{what} is not a tuple of sizes")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_flags: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    shape, stride = _dims(shape, "shape"), _dims(stride, "stride")
    (offset,) = _dims((offset,), "offset")
    if len(shape) != len(stride):
        raise ValueError(f"shape {shape} with stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    numel = math.prod(shape)
    # numel > storage would be an expanded tensor: nobody saves one, and it may claim any amount of memory
    if numel and (last >= storage.numel or numel > storage.numel):
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.numel} elements")
    return Tensor(storage, storage.dtype, shape, stride, offset)


def _parameter(data: Any, *_flags: Any) -> Any:
    return data


def _numpy_reconstruct(*_args: Any) -> NumpyArray:
    return NumpyArray()


def _numpy_dtype(code: Any, *_flags: Any) -> Record:
    dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 3 else None
    if dtype is None or dtype.kind not in "biuf":
        raise ValueError(f"numpy dtype {shown(code)}")
    record = Record("dtype")
    record.dtype = dtype.str
    return record


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, Record) or not isinstance(data, bytes):
        raise ValueError("a numpy scalar without dtype and bytes")
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 spells bytes
        raise ValueError(f"encoding {shown(encoding)}")
    return text.encode("latin1")


def _path(*parts: Any) -> Label:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a path of something that is not text")
    return Label("/".join(parts))


def _size(sizes: Any) -> tuple[int, ...]:
    return _dims(sizes, "torch.Size")


def _record(name: str) -> Callable[..., Record]:
    return lambda *args: Record(name, args)


def _label(name: str) -> Callable[..., Label]:
    def build(*args: Any) -> Label:
        if not all(isinstance(a, str | int | float) for a in args):
            raise ValueError(f"{name} of something that is not a constant")
        return Label(f"{name}({', '.join(str(a) for a in args)})")

    return build


def _table() -> dict[tuple[str, str], Any]:
    dcp = "torch.distributed.checkpoint"
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): lambda *items: _to_dict(*items),
        ("_codecs", "encode"): _encode,
        ("pathlib", "PosixPath"): _path,
        ("torch", "Size"): _size,
        ("torch", "device"): _label("device"),
        ("torch.serialization", "_get_layout"): _label("layout"),
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("numpy", "dtype"): _numpy_dtype,
        ("numpy", "ndarray"): _record("ndarray"),
        ("numpy.dtypes", "UInt32DType"): lambda *_: _numpy_dtype("u4"),
    }
    for numpy_core in ("numpy.core", "numpy._core"):
        table[numpy_core + ".multiarray", "_reconstruct"] = _numpy_reconstruct
        table[numpy_core + ".multiarray", "scalar"] = _numpy_scalar
    records = {
        "argparse": ["Namespace"],
        "types": ["SimpleNamespace"],
        f"{dcp}.metadata": [
            "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
            "BytesStorageMetadata", "ChunkStorageMetadata",
        ],
        f"{dcp}.planner": ["WriteItem", "TensorWriteData", "BytesIOWriteData", "SavePlan"],
        f"{dcp}.filesystem": ["_StorageInfo"],
        "megatron.core.dist_checkpointing.strategies.torch": ["MCoreSavePlan"],
        "megatron.core.rerun_state_machine": ["RerunDiagnostic", "RerunState"],
    }  # fmt: skip
    enums = {
        f"{dcp}.metadata": ["_MEM_FORMAT_ENCODING"],
        f"{dcp}.planner": ["WriteItemType"],
        "megatron.core.enums": ["ModelType", "Fp8Recipe"],
        "megatron.core.rerun_state_machine": ["RerunMode"],
        "megatron.core.transformer.enums": [
            "AttnBackend",
            "AttnMaskType",
            "AttnType",
            "LayerType",
            "ModelType",
        ],
    }
    for makers, make in ((records, _record), (enums, _label)):
        for module, names in makers.items():
            table.update({(module, name): make(name) for name in names})
    table.update({("torch", dtype): Label(dtype) for dtype in NUMPY_DTYPES})
    table.update({("torch", storage): Label(storage) for storage in STORAGES})
    table["torch.storage", "UntypedStorage"] = Label("UntypedStorage")
    return table


# ---------------------------------------------------------------- the stack machine

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUSH_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_SCALARS = (str, bytes, int, float, bool, type(None))


def _key(value: Any) -> Any:
    """Allow as a dictionary key only what hashes in constant time (a nest of shared tuples would not)."""
    flat = value if type(value) is tuple else (value,)
    if isinstance(value, Record) or all(isinstance(v, _SCALARS) for v in flat):
        return value
    raise ValueError("a dictionary key that is not a constant")


def _to_dict(items: Any = ()) -> dict:
    return {_key(key): value for key, value in items}


class _Machine:
    """Runs one pickle. `archive` resolves the storages of a torch.save file; a plain pickle has none."""

    def __init__(self, archive: TorchArchive | None):
        self.archive = archive
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = 0

    def run(self, data: bytes) -> Any:
        self.budget = 4 * len(data) + 4096
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                (result,) = self.stack
                return result
            self.step(name, argument)
        raise ValueError("no STOP")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _PUT:
            self.memo[int(argument)] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[int(argument)])
        elif name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _FIXED_TUPLES:
            stack[-_FIXED_TUPLES[name] :] = [tuple(self.top(_FIXED_TUPLES[name]))]
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.pop_to_mark() if name == "SETITEMS" else self.pop(2))
        elif name in ("APPEND", "APPENDS"):
            self.append(self.pop_to_mark() if name == "APPENDS" else self.pop(1))
        elif name == "GLOBAL":
            stack.append(self.find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.find(*self.pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            self.build(*self.pop(2))
        elif name == "BUILD":
            self.set_state(*self.pop(1))
        elif name == "BINPERSID":
            stack.append(self.storage(*self.pop(1)))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name}")

    def top(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count or any(v is _MARK for v in values):
            raise ValueError("stack underflow")
        return values

    def pop(self, count: int) -> list[Any]:
        values = self.top(count)
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:  # IndexError below the bottom: reported as a damaged pickle
            position -= 1
            if position < 0:
                raise ValueError("no mark")
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values

    def charge(self, *values: Any) -> None:
        """Bound the copying: memoised values can be passed to a global any number of times."""
        self.budget -= sum(len(v) for v in values if isinstance(v, str | bytes | tuple | list | dict))
        if self.budget < 0:
            raise ValueError("it expands to far more than its size")

    def set_items(self, values: list[Any]) -> None:
        (target,) = self.top(1)
        if type(target) is not dict:
            raise ValueError("items set on something that is not a dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def append(self, values: list[Any]) -> None:
        (target,) = self.top(1)
        if type(target) is not list:
            raise ValueError("items appended to something that is not a list")
        target.extend(values)

    def find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is not a string")
        if (module, name) not in GLOBALS:
            raise _Refused(f"{module}.{name}"[:200])
        entry = GLOBALS[module, name]
        return entry if isinstance(entry, Label) else _Global(name, entry)

    def build(self, function: Any, args: Any) -> None:
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is not a known global")
        self.charge(*args)
        self.stack.append(function.build(*args))

    def set_state(self, state: Any) -> None:
        (target,) = self.top(1)
        self.charge(state)
        if isinstance(target, NumpyArray):
            _version, shape, dtype, fortran, data = state
            shape = _dims(shape, "shape")
            if not isinstance(dtype, Record) or not isinstance(data, bytes) or fortran:
                raise ValueError("a numpy array in an unknown form")
            if math.prod(shape) * np.dtype(dtype.dtype).itemsize != len(data):
                raise ValueError(f"a numpy array of shape {shape} with {len(data)} bytes")
            target.dtype, target.shape, target._data = dtype.dtype, shape, data
        elif isinstance(target, Record) and target.type_name == "dtype":
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
            if order not in ("<", "|", "="):
                raise ValueError("numpy dtype that is not little-endian")
        elif isinstance(target, Record):
            if isinstance(state, dict) and all(isinstance(k, str) and k not in _RESERVED for k in state):
                vars(target).update(state)
            else:  # a class with its own __getstate__
                target.state = state
        elif isinstance(target, dict) and isinstance(state, dict):
            pass  # attributes of an OrderedDict: nothing that a checkpoint needs
        else:
            raise ValueError("state set on something that has none")

    def storage(self, reference: Any) -> Storage:
        if self.archive is None or not isinstance(reference, tuple) or len(reference) != 5:
            raise ValueError("a persistent reference that is not a storage")
        kind, storage_type, key, _location, numel = reference
        dtype = STORAGES.get(storage_type) if isinstance(storage_type, str) else None
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise ValueError("a persistent reference that is not a storage")
        (numel,) = _dims((numel,), "storage size")
        stored = self.archive.member(f"data/{key}").size
        if stored != numel * NUMPY_DTYPES[dtype].itemsize:
            raise ValueError(f"storage {key} has {stored} bytes for {numel} {dtype} elements")
        return Storage(self.archive, dtype, key, numel)


class _Refused(Exception):
    """A global outside the table."""


GLOBALS = _table()


def _run(data: bytes, where: str, archive: TorchArchive | None = None) -> Any:
    try:
        return _Machine(archive).run(data)
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(f"{where}: refused global {error} in a pickle (not known to be harmless)") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{where}: damaged or unsupported pickle: {error}") from None


# ---------------------------------------------------------------- torch.save archives


class ByteRange:
    """Bytes [start, start + length) of an open file, read by position (no shared file offset)."""

    def __init__(self, fd: int, start: int, length: int, where: str):
        self.fd, self.start, self.length, self.where = fd, start, length, where

    def read_into(self, position: int, view: memoryview) -> None:
        if position < 0 or position + len(view) > self.length:
            raise CheckpointError(f"{self.where}: bytes {position}+{len(view)} lie outside the {self.length} stored")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], self.start + position + done)
            except OSError as error:
                raise CheckpointError(f"{self.where}: cannot be read ({error.strerror})") from None
            if count <= 0:
                raise CheckpointError(f"{self.where}: the file ends early (truncated)")
            done += count

    def read(self, position: int, length: int) -> bytes:
        if position < 0 or length < 0 or position + length > self.length:
            raise CheckpointError(f"{self.where}: bytes {position}+{length} lie outside the {self.length} stored")
        data = bytearray(length)
        self.read_into(position, memoryview(data))
        return bytes(data)


class _Window(io.RawIOBase):
    """A ByteRange as the seekable file that zipfile wants."""

    def __init__(self, source: ByteRange):
        self.source, self.position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.source.length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.source.length - self.position))
        if count:
            self.source.read_into(self.position, memoryview(buffer)[:count])
        self.position += count
        return count


@dataclass(frozen=True)
class Member:
    """One STORED member: bytes [position, position + size) of `source`."""

    source: ByteRange
    name: str
    position: int
    size: int
    crc: int

    def read(self) -> bytes:
        data = self.source.read(self.position, self.size)
        self.check(zlib.crc32(data))
        return data

    def check(self, crc: int) -> None:
        if crc != self.crc:
            raise CheckpointError(f"{self.source.where}: CRC of {self.name} is wrong (damaged bytes)")


class TorchArchive:
    """A torch.save ZIP inside `source`."""

    def __init__(self, source: ByteRange):
        self.source = source
        try:
            with zipfile.ZipFile(io.BufferedReader(_Window(source), 4096)) as archive:
                infos = archive.infolist()
        except CheckpointError:
            raise
        # zipfile raises whatever its parser stumbles on; all of it means the same thing here
        except (
            zipfile.BadZipFile,
            ValueError,
            OSError,
            struct.error,
            NotImplementedError,
            OverflowError,
        ) as error:
            raise CheckpointError(f"{source.where}: not a complete torch.save archive ({error})") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CheckpointError(f"{source.where}: member {info.filename!r} is compressed, expected STORED")
            if not name or name in self._members:
                raise CheckpointError(f"{source.where}: unexpected or repeated member {info.filename!r}")
            self._members[name] = info
        if "byteorder" in self._members and self.member("byteorder").read() != b"little":
            raise CheckpointError(f"{source.where}: byte order is not little-endian")

    def member(self, name: str) -> Member:
        info = self._members.get(name)
        if info is None:
            raise CheckpointError(f"{self.source.where}: the torch.save archive has no member {name!r}")
        # The local header repeats the name and may carry padding; only its two lengths are needed.
        header = self.source.read(info.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.source.where}: no local header for {name!r} (damaged bytes)")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        position = info.header_offset + 30 + name_length + extra_length
        if position + info.file_size > self.source.length:
            raise CheckpointError(f"{self.source.where}: member {name!r} is cut short")
        return Member(self.source, name, position, info.file_size, info.CRC)

    def load(self) -> Any:
        """The saved object; its tensors are `Tensor` records that read their bytes on `.numpy()`."""
        return _run(self.member("data.pkl").read(), self.source.where, self)


# ---------------------------------------------------------------- files


def load(path: str | os.PathLike) -> Any:
    """The object in `path`, a plain pickle or a torch.save archive, as inert data.

    dict, list, tuple, str, bytes, numbers, None, `Record`, `Label`; arrays as `Tensor` or `NumpyArray` with
    `.dtype` (str), `.shape` and `.numpy()`. Raises CheckpointError naming the file, and the global where one
    is refused.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a named pipe would block for ever
        raise CheckpointError(f"{path}: not a regular file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.startswith(b"PK\x03\x04"):
        return _run(data, str(path))
    return TorchArchive(_MemoryRange(data, str(path))).load()


class _MemoryRange(ByteRange):
    """The same interface over bytes, for small files that are read whole."""

    def __init__(self, data: bytes, where: str):
        super().__init__(-1, 0, len(data), where)
        self.data = memoryview(data)

    def read_into(self, position: int, view: memoryview) -> None:
        if position < 0 or position + len(view) > self.length:
            raise CheckpointError(f"{self.where}: bytes {position}+{len(view)} lie outside the {self.length} stored")
        view[:] = self.data[position : position + len(view)]
