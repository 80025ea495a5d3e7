"""The rows of a .jsonl or .parquet file, in order and one at a time, each with the line or row it came from.

slime reads .jsonl with pandas.read_json(lines=True) and .parquet with pandas.read_parquet, the whole file at once
(slime/utils/data.py at 8359c9a). The reader here keeps one line, or one batch of rows, in memory and agrees with
pandas 2.3 on what a row is: lines end at "\n", blank lines are skipped, NaN and raw control characters are accepted,
integers beyond 64 bits are not. It is stricter in two things that pandas passes over: a key that is twice in one
object, and two values on one line.

A conversion may also start from .json, one list of objects; slime does not read that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tools.data.errors import DataError, shown

TRAINABLE = (".jsonl", ".parquet")
LONGEST = 1 << 28  # bytes of a line, and characters of an item of a list
_CHUNK = 1 << 20
_BATCH = 256  # rows of a .parquet file

Parsed = tuple[int, dict[str, Any], str | None]  # number, row, what is wrong with it


class Source:
    """The rows of one file. `where(number)` names one, `position` of `size` bytes have been read."""

    def __init__(self, path: Path, *, suffixes: tuple[str, ...] = TRAINABLE):
        self.path = path
        if path.is_dir():
            raise DataError(f"{path}: expected a {' or '.join(suffixes)} file, found a directory")
        self._suffix = next((suffix for suffix in suffixes if str(path).endswith(suffix)), None)
        if self._suffix is None:
            raise DataError(f"{path}: expected a file whose name ends in {' or '.join(suffixes)}")
        self._stamp = self._state()
        self.size, self.position = self._stamp[0], 0

    @property
    def text(self) -> bool:
        """Is it read by lines of text?"""
        return self._suffix == ".jsonl"

    @property
    def unit(self) -> str:
        return {".jsonl": "line", ".parquet": "row", ".json": "item"}[self._suffix]

    def where(self, number: int) -> str:
        """FILE:7 for a line, as editors and compilers write it; FILE: row 7 for a row. From 1."""
        return f"{self.path}:{number}" if self.text else f"{self.path}: {self.unit} {number}"

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row). Raises DataError at the first row that cannot be read."""
        for number, row, problem in self.parsed():
            if problem:
                raise DataError(f"{self.where(number)}: {problem}")
            yield number, row

    def parsed(self, columns: tuple[str, ...] | None = None) -> Iterator[Parsed]:
        """(number, row, None), or (number, {}, problem) for a row that cannot be read; reading goes on after it.

        columns: those of a .parquet file that are wanted. Raises DataError for a file that cannot be read at all, and
        for one that changes meanwhile.
        """
        self.position = 0
        if self._suffix == ".parquet":
            yield from self._parquet(columns)
        else:
            with self.path.open("rb") as file:
                yield from self._lines(file) if self.text else self._items(file)
        if self._state() != self._stamp:
            raise DataError(f"{self.path}: changed while it was read")

    def _state(self) -> tuple[int, int]:
        try:
            state = os.stat(self.path)
        except OSError as error:
            raise DataError.of(error, self.path) from None
        return state.st_size, state.st_mtime_ns

    # ---------------------------------------------------------------- text

    def _lines(self, file: BinaryIO) -> Iterator[Parsed]:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise DataError(
                    f"{self.where(number)}: expected a line of at most {LONGEST:,} bytes, found a longer one"
                )
            self.position += len(line)
            try:
                if text := _decode(line).strip():
                    yield number, _object(_DECODER.decode(text)), None
            except (ValueError, RecursionError) as error:
                ends = "" if line.endswith(b"\n") else "; the file ends in this line: cut off?"
                yield number, {}, f"expected a JSON object, found {_trouble(error, line)}{ends}"

    def _items(self, file: BinaryIO) -> Iterator[Parsed]:
        """The objects of one JSON list, decoded as far as the file has been read."""
        buffer, number, chunk = b"", 0, _CHUNK
        state = "["  # what must come next: the list, then items and commas in turn
        while True:
            data = file.read(chunk)
            buffer += data
            self.position += len(data)
            try:
                text, rest = _whole_characters(buffer, not data)
            except UnicodeDecodeError as error:
                found = f"the byte 0x{buffer[error.start]:02x}, which is no UTF-8"
                raise DataError(f"{self.where(number + 1)}: expected a JSON object, found {found}") from None
            start = 0
            while (start := _skip_blanks(text, start)) < len(text):
                found = text[start]
                if state == "[" and found == "[":
                    state = "item or ]"
                elif state == ", or ]" and found == ",":
                    state = "item"
                elif state != "item" and found == "]":
                    if text[start + 1 :].strip() or file.read(_CHUNK).strip():
                        raise DataError(f"{self.path}: expected one JSON list, found more after it")
                    return
                elif state in ("item", "item or ]") and found == "{":
                    try:
                        row, start = _DECODER.raw_decode(text, start)
                    except (ValueError, RecursionError) as error:
                        if data and len(text) - start <= LONGEST and isinstance(error, json.JSONDecodeError):
                            break  # perhaps not all of it has been read
                        number += 1
                        raise DataError(f"{self.where(number)}: expected a JSON object, found {error}") from None
                    number, state = number + 1, ", or ]"
                    yield number, row, None
                    continue
                else:
                    raise DataError(
                        f"{self.where(number + 1)}: expected {state.replace('item', 'an object')} of a JSON list, "
                        f"found {shown(text[start : start + 20])}"
                    )
                start += 1
            if not data:
                raise DataError(f"{self.path}: expected a JSON list, found its end after {number} items: cut off?")
            # An object that is not all here is parsed again with more: twice as much each time.
            chunk = max(_CHUNK, len(text) - start)
            buffer = text[start:].encode() + rest

    # ---------------------------------------------------------------- parquet

    def _parquet(self, columns: tuple[str, ...] | None) -> Iterator[Parsed]:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{self.path}: reading .parquet needs the package pyarrow") from None
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                total = file.metadata.num_rows
                wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(_BATCH, columns=wanted):
                    for row, problem in _python_rows(batch):
                        number += 1
                        self.position = self.size * number // total
                        yield number, row, problem
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: cannot be read as .parquet ({error})") from None


def _python_rows(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The rows of a pyarrow RecordBatch; a column may be absent, and text may be no UTF-8."""
    try:
        rows = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
        yield from ((row, None) for row in rows)
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0], None
            except UnicodeDecodeError as error:
                yield {}, f"expected UTF-8, found the byte 0x{error.object[error.start]:02x}"


# ---------------------------------------------------------------- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} twice in one object")
    return row


def _integer(text: str) -> int:
    value = int(text) if len(text) < 21 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"an integer beyond 64 bits, {shown(text)}, which pandas refuses")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, strict=False)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(shown(value))
    return value


def _decode(line: bytes) -> str:
    text = line.decode()
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark, which pandas refuses; save the file as UTF-8 without one")
    return text


def _trouble(error: Exception, line: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"the byte 0x{line[error.start]:02x} at byte {error.start + 1}, which is no UTF-8"
    if isinstance(error, json.JSONDecodeError):
        text = line.decode().strip()
        return f"{shown(text)} ({error.msg} at character {error.pos + 1})"
    return "one nested too deep" if isinstance(error, RecursionError) else str(error)


def _whole_characters(data: bytes, last: bool) -> tuple[str, bytes]:
    """(text, bytes of a last character that is not whole). Raises UnicodeDecodeError for bytes that are no UTF-8."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if last or len(data) - error.start > 3:
            raise
        return data[: error.start].decode(), data[error.start :]


def _skip_blanks(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start
