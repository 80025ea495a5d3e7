"""Write what torch.save writes, without torch and without holding the data.

A torch.save archive is a ZIP of STORED members: a pickle that rebuilds the object, and the raw elements of each tensor.
Every size is known before the first byte, so an `Archive` is laid out ahead: its place in a file can be reserved, its
elements written from any thread in any order, and the few bytes around them last, once their CRC is known.

Pickles name classes of torch by module and name (`Named`, `Call`, `Instance`); nothing is imported. No value is
written as a reference to an earlier one, so equal inputs give equal bytes. The counterpart that reads is
`safe_pickle`.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safe_pickle import NUMPY_DTYPES, STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_ALIGNMENT = 64
_LIMIT = 2**32 - 2**16  # beyond it a ZIP needs 64-bit records, which nothing here does
_DATE = 1 << 5 | 1  # 1 January 1980, the first day of ZIP


@dataclass(frozen=True)
class Named:
    """A class, function or constant that the reader imports: torch.float32, torch.Size."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Call:
        return Call(self, args)


@dataclass(frozen=True)
class Call:
    """`function(*args)`."""

    function: Named
    args: tuple


@dataclass(frozen=True, eq=False)  # hashed by identity: MetadataIndex is a dictionary key
class Instance:
    """An object of class `kind` whose state is `state`: attributes, or what its __setstate__ takes."""

    kind: Named
    state: Any


@dataclass(frozen=True)
class Array:
    """A contiguous tensor of torch dtype `dtype`; `data` is None where the elements are written later."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numel: int


class _Pickler(pickle._Pickler):
    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.fast = True  # no references
        self.arrays: list[Array] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", Named("torch", _STORAGE_OF[value.dtype]), value.key, "cpu", value.numel)
        return None

    def save_named(self, value: Named) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save(value.args)
        self.write(pickle.REDUCE)

    def save_instance(self, value: Instance) -> None:
        self.save(value.kind)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(value.state)
        self.write(pickle.BUILD)

    def save_namespace(self, value: argparse.Namespace) -> None:
        self.save_instance(Instance(Named("argparse", "Namespace"), vars(value)))

    def save_array(self, value: Array) -> None:
        storage = _Storage(value.dtype, str(len(self.arrays)), math.prod(value.shape))
        self.arrays.append(value)
        strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        rebuild = Named("torch._utils", "_rebuild_tensor_v2")
        self.save(rebuild(storage, 0, value.shape, strides, False, OrderedDict()))

    dispatch.update(
        {
            Named: save_named,
            Call: save_call,
            Instance: save_instance,
            argparse.Namespace: save_namespace,
            Array: save_array,
        }
    )


def dumps(value: Any) -> tuple[bytes, list[Array]]:
    """The pickle of `value` (constants, containers, numpy arrays and the classes above), and its arrays in order."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    return buffer.getvalue(), pickler.arrays


@dataclass(frozen=True)
class _Member:
    name: bytes
    size: int
    start: int  # of its local header
    position: int  # of its bytes
    data: bytes | None  # None: the elements of the array number `array`
    array: int = -1


class Archive:
    """The layout of one archive.

    size: bytes in all. payloads: for each array of the value, the position of its elements in the archive.
    """

    def __init__(self, value: Any):
        pickled, self.arrays = dumps(value)
        self._members: list[_Member] = []
        self._end = 0
        self._add("data.pkl", len(pickled), pickled)
        self._add("byteorder", 6, b"little")
        for number, array in enumerate(self.arrays):
            self._add(f"data/{number}", array.nbytes, None, number)
        self._add("version", 2, b"3\n")
        self.payloads = [member.position for member in self._members if member.data is None]
        directory = sum(46 + len(member.name) for member in self._members)
        self.size = self._end + directory + 22
        if self.size > _LIMIT:
            raise CheckpointError(f"a torch.save archive of {self.size} bytes, expected at most {_LIMIT}")

    def frame(self, crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """(position, bytes) of everything but the arrays' elements, whose CRC-32 are `crcs`."""
        directory = b""
        for member in self._members:
            crc = crcs[member.array] if member.data is None else zlib.crc32(member.data)
            common = struct.pack("<HHHHIII", 0, 0, 0, _DATE, crc, member.size, member.size)
            padding = member.position - member.start - 30 - len(member.name)
            extra = b"FB" + struct.pack("<H", padding - 4) + bytes(padding - 4)
            local = struct.pack("<4sH", b"PK\3\4", 20) + common + struct.pack("<HH", len(member.name), padding)
            yield member.start, local + member.name + extra + (member.data or b"")
            directory += struct.pack("<4sHH", b"PK\1\2", 20, 20) + common
            directory += struct.pack("<HHHHHII", len(member.name), 0, 0, 0, 0, 0, member.start) + member.name
        count, start = len(self._members), self._end
        end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
        yield start, directory + end

    def pieces(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """(position, bytes) of everything, for a value whose arrays have their data; out of order."""
        views = [memoryview(array.data.reshape(-1).view(np.uint8)) for array in self.arrays]
        yield from zip(self.payloads, views, strict=True)
        yield from self.frame([zlib.crc32(view) for view in views])

    def to_bytes(self) -> bytes:
        """The whole archive, for a value whose arrays have their data."""
        content = bytearray(self.size)
        for position, piece in self.pieces():
            content[position : position + len(piece)] = piece
        return bytes(content)

    def _add(self, name: str, size: int, data: bytes | None, array: int = -1) -> None:
        encoded = f"archive/{name}".encode()
        position = self._end + 30 + len(encoded) + 4  # the 4 bytes that open the padding
        position += -position % _ALIGNMENT
        self._members.append(_Member(encoded, size, self._end, position, data, array))
        self._end = position + size
