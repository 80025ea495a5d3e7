"""Output that appears whole or not at all: written to `.NAME.partial` beside it, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tools.data.errors import DataError

_BATCH = 1000  # rows of a .parquet file written at a time


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it gets its name when the block ends without an exception.

    Raises DataError if another process is writing the same, and for what the file system refuses.
    """
    with partial(path) as file:
        yield file
        file.flush()
        os.replace(file.name, path)


@contextlib.contextmanager
def partial(path: Path) -> Iterator[IO[bytes]]:
    """The empty file `.NAME.partial` beside `path`, locked.

    At the end it is removed, with the directories that were made for it, unless it has been renamed.
    """
    name = path.with_name(f".{path.name}.partial")
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(name, "r+b", opener=_create) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{path}: another process is writing it") from None
            if not _is(file, name):
                raise DataError(f"{path}: another process has just written it")
            file.truncate()
            try:
                yield file
            finally:
                if _is(file, name):
                    os.unlink(name)
                    for folder in made:
                        folder.rmdir()
    except OSError as error:
        raise DataError.of(error, path) from None


def _create(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_CREAT, 0o666)


def _is(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- rows


def write_rows(rows: Iterable[dict[str, Any]], path: Path, key: str) -> bool:
    """Write rows to a .jsonl or .parquet file; `key` holds the messages. False if the file was there already, the same.

    Raises DataError if another file is there, which stays.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    with partial(path) as file:
        write(rows, file, key)
        file.flush()
        if path.exists():
            if not path.is_file() or not _same(path, Path(file.name)):
                raise DataError(f"{path}: exists and holds something else; remove it, or choose another --output")
            return False
        os.replace(file.name, path)
        return True


def _write_jsonl(rows: Iterable[dict[str, Any]], file: IO[bytes], key: str) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_parquet(rows: Iterable[dict[str, Any]], file: IO[bytes], key: str) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{file.name}: writing .parquet needs the package pyarrow") from None
    message = [("role", pa.string()), ("content", pa.string())]
    if key == "messages":
        # A column of all rows: absent means 1 to slime, but the null that .parquet would put there means 0.
        message.append(("step_loss_mask", pa.int8()))
    columns = [(key, pa.list_(pa.struct(message)))] + ([] if key == "messages" else [("label", pa.string())])
    schema = pa.schema(columns)
    rows = iter(rows)
    with parquet.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            if key == "messages":
                batch = [{key: [{"step_loss_mask": 1, **message} for message in row[key]]} for row in batch]
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _same(one: Path, other: Path) -> bool:
    if one.suffix == ".jsonl":
        return filecmp.cmp(one, other, shallow=False)
    # Row by row: the bytes of a .parquet file also depend on the version of its writer.
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(one) as left, parquet.ParquetFile(other) as right:
            batches = itertools.zip_longest(left.iter_batches(_BATCH), right.iter_batches(_BATCH))
            return all(a == b for a, b in batches)
    except (pa.ArrowException, OSError):
        return False
