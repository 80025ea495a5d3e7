"""An output directory that appears whole or not at all, and can be gone on with after a kill.

Everything is written to a hidden sibling, `.<name>.partial`, which `publish` renames. Work is done in items; after an
item its byte ranges and their CRC-32 go into a journal in the same directory. With `resume`, an item that the journal
of an equal job lists is skipped once its bytes have been read back and found to match: nothing is trusted because it
is there.

    error             the partial directory is removed
    Ctrl-C, SIGTERM   it is kept for --resume, as after a kill
    next run          removes it, or with --resume goes on with it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.parallel import PIECE

JOURNAL = ".journal.jsonl"

Range = tuple[str, int, int, int]  # file, offset, length, CRC-32


class Staging:
    """Use as a context manager around all writing; leaving it without `publish` leaves no output.

    job: what decides the output, as JSON data; a journal of another job is not resumed. inputs: directories that the
    output must not replace. size: bytes that will be written, checked against the free space before anything is.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        job: dict[str, Any],
        size: int,
        inputs: Iterable[Path] = (),
        force: bool = False,
        resume: bool = False,
        fsync: bool = False,
    ):
        self.directory = Path(os.path.realpath(directory))
        if not self.directory.name:
            raise CheckpointError(f"{self.directory}: cannot be replaced by an output")
        self.partial = self.directory.with_name(f".{self.directory.name}.partial")
        self._old = self.directory.with_name(f".{self.directory.name}.replaced")
        self._job = json.loads(json.dumps(job))
        self._size, self._force, self._resume, self._fsync = size, force, resume, fsync
        self._inputs = [Path(os.path.realpath(path)) for path in inputs]
        self._files: dict[str, int] = {}
        self._writing: dict[str, threading.Lock] = {}
        self._done: dict[str, list[Range]] = {}
        self._lock = threading.Lock()
        self._made: list[Path] = []
        self._owner = self._journal = -1
        self._fresh = False
        self._published = False

    # ---- life

    def __enter__(self) -> Staging:
        self._check_target()
        try:
            self._make_parents()
            self._own()
            self._recover()
            self._take_over()
            self._check_space()
        except OSError as error:
            self._leave(keep=False)
            raise CheckpointError(f"{self.directory}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            self._leave(keep=not self._fresh)
            raise
        return self

    def __exit__(self, kind: Any, error: Any, _traceback: Any) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._leave(keep=interrupted)
        if interrupted and self.partial.exists():
            print(f"finished parts are kept in {self.partial}: --resume goes on with them", file=sys.stderr)
        if isinstance(error, OSError):
            raise CheckpointError.of(error, self.directory) from error

    def publish(self) -> None:
        """Give the directory its name. The old one is set aside first and removed last."""
        if self._fsync:
            for path in [*self.partial.rglob("*"), self.partial]:
                fsync_path(path)
        self._close_files()
        (self.partial / JOURNAL).unlink()
        aside = self._force and self.directory.exists()
        if aside:
            self.directory.rename(self._old)
        try:
            self.partial.rename(self.directory)
        except BaseException:
            if aside and not self.directory.exists():
                self._old.rename(self.directory)
            raise
        if self._fsync:
            fsync_path(self.directory.parent)
        self._published = True
        shutil.rmtree(self._old, ignore_errors=True)

    # ---- files

    def create(self, name: str, size: int) -> None:
        """A file of `size` bytes to be filled by `write`; what an interrupted run has put in it stays."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._files[name], self._writing[name] = fd, threading.Lock()
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)

    def write(self, name: str, offset: int, view: memoryview) -> None:
        """Put the bytes of `view` at `offset` of a created file; any thread."""
        fd, done = self._files[name], 0
        try:
            # The kernel lets one writer into a file at a time, and the others spin: better that they sleep here.
            with self._writing[name]:
                while done < len(view):
                    done += os.pwritev(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError.of(error, self.partial / name) from error

    def write_text(self, name: str, text: str) -> None:
        (self.partial / name).write_text(text, encoding="utf-8")

    def write_bytes(self, name: str, content: bytes) -> None:
        (self.partial / name).write_bytes(content)

    def write_json(self, name: str, value: Any) -> None:
        try:
            text = json.dumps(value, indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            text = json.dumps(value, indent=2).encode()
        self.write_bytes(name, text + b"\n")

    def copy(self, source: Path, name: str | None = None) -> None:
        shutil.copyfile(source, self.partial / (name or source.name))

    # ---- items

    def done(self, item: str) -> bool:
        """Whether the journal lists `item` and its bytes are there unchanged."""
        ranges = self._done.get(item)
        return bool(ranges) and all(self._matches(*one) for one in ranges)

    def record(self, item: str, ranges: Iterable[Range]) -> None:
        """Note that `item` is finished; any thread."""
        line = json.dumps([item, list(ranges)], separators=(",", ":")) + "\n"
        with self._lock:
            os.write(self._journal, line.encode())

    def _matches(self, name: str, offset: int, length: int, crc: int) -> bool:
        found, position, fd = 0, offset, self._files.get(name)
        if fd is None or not 0 <= offset <= offset + length <= os.fstat(fd).st_size:
            return False
        while position < offset + length:
            data = os.pread(fd, min(PIECE, offset + length - position), position)
            if not data:
                return False
            found = zlib.crc32(data, found)
            position += len(data)
        return found == crc

    # ---- details

    def _check_target(self) -> None:
        for path in self._inputs:
            if path == self.directory or self.directory in path.parents:
                raise CheckpointError(f"{self.directory}: the output would replace its own input {path}")
        if not os.path.lexists(self.directory):
            return
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: expected a directory to write, found a file")
        try:
            filled = any(self.directory.iterdir())
        except OSError as error:
            raise CheckpointError.of(error, self.directory) from None
        if filled and not self._force:
            raise CheckpointError(f"{self.directory}: exists and is not empty; -f replaces it")

    def _make_parents(self) -> None:
        missing = [path for path in [*reversed(self.directory.parents)] if not path.exists()]
        for path in missing:
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _recover(self) -> None:
        """Bring back what a run set aside that was killed between its two renames."""
        if self._old.exists():
            if self.directory.exists() and any(self.directory.iterdir()):
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.directory)  # also over an empty directory
        self._check_target()

    def _take_over(self) -> None:
        """Keep the finished items of the partial directory, or start clean."""
        if self._resume and not self._fresh and self._read_journal():
            self._journal = os.open(self.partial / JOURNAL, os.O_WRONLY | os.O_APPEND)
            os.write(self._journal, b"\n")  # the last line may be cut
            self._keep({name for ranges in self._done.values() for name, *_ in ranges})
            return
        for path in self.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._journal = os.open(self.partial / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._journal, (json.dumps(self._job) + "\n").encode())

    def _keep(self, names: set[str]) -> None:
        """Remove every other file: companions are copied anew, and the source may no longer have one."""
        for path in self.partial.rglob("*"):
            name = str(path.relative_to(self.partial))
            if name != JOURNAL and name not in names and not path.is_dir():
                path.unlink()

    def _own(self) -> None:
        """Lock the partial directory, made where there is none; what stays the same directory until `_leave`."""
        for _ in range(100):
            try:
                self.partial.mkdir()
                self._fresh = True
            except FileExistsError:
                self._fresh = False
            with contextlib.suppress(FileNotFoundError):  # another process has just removed or published it
                fd = os.open(self.partial, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    where = f"(in {self.partial})"
                    raise CheckpointError(f"{self.directory}: another process is writing it {where}") from None
                except OSError:
                    pass  # a file system without locks
                if os.path.samestat(os.fstat(fd), os.stat(self.partial)):
                    self._owner = fd
                    return
                os.close(fd)
        raise CheckpointError(f"{self.partial}: cannot be locked")

    def _read_journal(self) -> bool:
        try:
            lines = (self.partial / JOURNAL).read_text(encoding="utf-8").splitlines()
            same = json.loads(lines[0]) == self._job
            entries = [_entry(line) for line in lines[1:]] if same else []
        except (OSError, ValueError, IndexError, RecursionError):
            same, entries = False, []
        if not same:
            print("--resume: what is there is of another job or damaged; starting clean", file=sys.stderr)
            return False
        self._done = dict(entry for entry in entries if entry)
        return True

    def _check_space(self) -> None:
        staged = sum(path.stat().st_blocks * 512 for path in self.partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.partial).free
        if self._size - staged > free:
            self._leave(keep=self._resume)
            raise CheckpointError(
                f"{self.directory}: {self._size - staged} bytes more are needed, the disk has {free} free"
            )

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _leave(self, *, keep: bool) -> None:
        with contextlib.suppress(OSError):
            self._close_files()
        mine = self._owner >= 0
        if mine and not self._published and not keep:
            shutil.rmtree(self.partial, ignore_errors=True)
        if mine:
            os.close(self._owner)
            self._owner = -1
        if not self._published:
            for path in reversed(self._made):
                with contextlib.suppress(OSError):
                    path.rmdir()  # only if it is empty


def _entry(line: str) -> tuple[str, list[Range]] | None:
    """One line of a journal; None for the last line of a killed run, which may be cut."""
    try:
        item, ranges = json.loads(line)
        return str(item), [(str(f), int(o), int(n), int(c)) for f, o, n, c in ranges]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def fsync_path(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
