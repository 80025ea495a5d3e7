"""An output directory is whole or not there, whatever happens on the way; real kills, real full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, run
from tools.checkpoint import staging
from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.staging import JOURNAL, Staging

ITEMS = {"a": b"aaaa" * 300, "b": b"bbbb" * 500, "c": b"cccc" * 700, "d": b"dddd" * 900}
SIZE = sum(map(len, ITEMS.values()))
WHOLE = b"".join(ITEMS.values())
JOB = {"tool": "test", "number": 1}


def produce(target: Path, *, after: dict[str, Callable] | None = None, job: dict = JOB, **options) -> list[str]:
    """Write ITEMS to the file `data`; the names of those that had to be written. after: what to do behind an item."""
    written, offset = [], 0
    with Staging(target, job=job, size=SIZE, **options) as out:
        out.create("data", SIZE)
        for name, content in ITEMS.items():
            if not out.done(name):
                out.write("data", offset, memoryview(content))
                out.record(name, [("data", offset, len(content), zlib.crc32(content))])
                written.append(name)
            offset += len(content)
            (after or {}).get(name, lambda: None)()
        out.write_json("config.json", {"ü": 1})
        out.publish()
    return written


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from tests.tools.checkpoint.test_staging import produce
from tools.checkpoint import cli

def wait():
    print("held", flush=True)
    sys.stdin.readline()

ends = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "hold": wait}
def main(_):
    produce(Path(sys.argv[1]), after={sys.argv[2]: ends[sys.argv[3]]}, resume="--resume" in sys.argv,
            force="-f" in sys.argv)
    return 0

sys.exit(cli.run(main))
"""


def child(target: Path, item: str, end: str, *options: str) -> subprocess.Popen:
    """A process of its own that writes `target` and meets its end behind `item`."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(target), item, end, *options],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(target: Path, item: str, *options: str) -> Path:
    """Let a process be killed behind `item`; the partial directory that it left."""
    process = child(target, item, "kill", *options)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    partial = target.with_name(f".{target.name}.partial")
    assert (partial / JOURNAL).exists()
    return partial


@contextlib.contextmanager
def writer(target: Path, *options: str) -> Iterator[subprocess.Popen]:
    """A process that is in the middle of writing `target`; it goes on when the block ends."""
    process = child(target, "b", "hold", *options)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
        process.communicate("go\n", timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def one_line(error: pytest.ExceptionInfo | str, *parts: object) -> None:
    text = error if isinstance(error, str) else str(error.value)
    assert text.strip() and len(text.strip().splitlines()) == 1
    assert all(str(part) in text for part in parts), text


def is_whole(target: Path) -> None:
    assert tree(target) == {"data": WHOLE, "config.json": '{\n  "ü": 1\n}\n'.encode()}
    assert names(target.parent) == [target.name]


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def old_output(root: Path) -> Path:
    (root / "out" / "sub").mkdir(parents=True)
    (root / "out" / "sub" / "weights").write_bytes(b"precious")
    return root / "out"


OLD = {"sub": None, "sub/weights": b"precious"}


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("fsync", [False, True])
def test_the_output_and_nothing_else(root, fsync):
    assert produce(root / "out", fsync=fsync) == list("abcd")
    is_whole(root / "out")


def test_files_in_a_subdirectory_and_copies(root, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\0\xff{}")
    with Staging(root / "out", job=JOB, size=4) as out:
        out.create("release/shard", 4)
        out.write("release/shard", 1, memoryview(b"xyz"))
        out.copy(tmp_path / "tokenizer.json")
        out.copy(tmp_path / "tokenizer.json", "other.json")
        out.write_bytes("release/.metadata", b"m")
        assert not (root / "out").exists()
        out.publish()
    assert tree(root / "out") == {
        "other.json": b"\0\xff{}",
        "release": None,
        "release/.metadata": b"m",
        "release/shard": b"\0xyz",
        "tokenizer.json": b"\0\xff{}",
    }


def throw(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("error", [RuntimeError("mine"), CheckpointError("mine"), MemoryError("mine")], ids=repr)
def test_an_error_leaves_nothing(root, error):
    with pytest.raises(type(error), match="mine"):
        produce(root / "new" / "parents" / "out", after={"b": throw(error)})
    assert names(root) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_os_error_becomes_one_line(root, code):
    with pytest.raises(CheckpointError) as caught:
        produce(root / "out", after={"b": throw(OSError(code, os.strerror(code)))})
    one_line(caught, root / "out", "disk is full" if code == errno.ENOSPC else os.strerror(code))
    assert names(root) == []


def test_leaving_without_publish_leaves_nothing(root):
    with Staging(root / "new" / "out", job=JOB, size=0) as out:
        out.create("data", 10)
    assert names(root) == []


def test_parents_that_were_there_or_are_in_use_stay(root):
    (root / "there").mkdir()

    def use() -> None:
        (root / "there" / "made" / "file").write_text("of somebody else")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        produce(root / "there" / "made" / "deep" / "out", after={"a": use})
    assert tree(root) == {"there": None, "there/made": None, "there/made/file": b"of somebody else"}


# ---------------------------------------------------------------- what is there already


def test_a_non_empty_directory_is_refused(root):
    out = old_output(root)
    with pytest.raises(CheckpointError) as caught:
        produce(out)
    one_line(caught, out, "not empty", "-f")
    assert tree(root) == {"out": None, **{f"out/{name}": content for name, content in OLD.items()}}


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_directory_is_accepted(root, force):
    (root / "out").mkdir()
    produce(root / "out", force=force)
    is_whole(root / "out")


@pytest.mark.parametrize("kind", ["file", "fifo", "link to a file"])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way(root, tmp_path, kind, force):
    if kind == "fifo":
        os.mkfifo(root / "out")
    else:
        (tmp_path / "elsewhere").write_text("precious")
        (root / "out").symlink_to(tmp_path / "elsewhere")
        if kind == "file":
            (root / "out").unlink()
            (root / "out").write_text("precious")
    with pytest.raises(CheckpointError) as caught:
        produce(root / "out", force=force)
    one_line(caught, "found a file")
    assert names(root) == ["out"]
    if kind != "fifo":
        assert (root / "out").read_text() == "precious"


def test_a_file_as_parent(root):
    (root / "file").write_text("precious")
    with pytest.raises(CheckpointError) as caught:
        produce(root / "file" / "sub" / "out")
    one_line(caught, root / "file" / "sub" / "out")
    assert tree(root) == {"file": b"precious"}


def test_the_root_directory_is_refused():
    with pytest.raises(CheckpointError) as caught:
        produce(Path("/"))
    one_line(caught, "/")


def test_force_replaces_the_old_one_in_the_end(root):
    out = old_output(root)
    seen = []
    produce(out, force=True, after=dict.fromkeys("abcd", lambda: seen.append(tree(out))))
    assert seen == [OLD] * 4
    is_whole(out)


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()], ids=repr)
def test_force_keeps_the_old_one_on_error(root, error):
    out = old_output(root)
    with pytest.raises(type(error)):
        produce(out, force=True, after={"d": throw(error)})
    assert tree(out) == OLD
    assert names(root) == (["out"] if isinstance(error, RuntimeError) else [".out.partial", "out"])


def test_force_keeps_the_old_one_if_the_last_rename_fails(root, monkeypatch):
    out = old_output(root)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError) as caught:
        produce(out, force=True)
    one_line(caught)
    assert tree(root) == {"out": None, **{f"out/{name}": content for name, content in OLD.items()}}


def test_force_through_a_symlink_replaces_what_it_means(root, tmp_path):
    (tmp_path / "link").symlink_to(old_output(root))
    produce(tmp_path / "link", force=True)
    is_whole(root / "out")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "link") == tree(root / "out")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("in", "in"),
        ("link_to_in", "in"),
        ("in", "link_to_in"),
        ("link_to_parent/in", "in"),
        (".", "in"),
        ("link_to_parent", "in"),
        (".", "link_to_in"),
        ("in/../in/sub/..", "in"),
        ("in/sub/../../../root", "in/sub"),
    ],
)
def test_an_output_that_would_replace_its_input(root, monkeypatch, target, source, resume):
    (root / "in" / "sub").mkdir(parents=True)
    (root / "in" / "weights").write_text("precious")
    (root / "link_to_in").symlink_to("in")
    (root / "link_to_parent").symlink_to(root)
    monkeypatch.chdir(root)
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        produce(Path(target), inputs=[Path(source)], force=True, resume=resume)
    one_line(caught, "replace its own input", root / "in")
    assert sorted(root.parent.rglob("*")) == before and (root / "in" / "weights").read_text() == "precious"


def test_an_output_beside_or_inside_its_input(root):
    (root / "in").mkdir()
    produce(root / "in2", inputs=[root / "in"])
    produce(root / "in" / "out", inputs=[root / "in"])
    assert names(root) == ["in", "in2"] and (root / "in" / "out" / "data").read_bytes() == WHOLE


# ---------------------------------------------------------------- two processes


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_a_second_writer_is_refused(root, options):
    with writer(root / "out"):
        before = tree(root)
        with pytest.raises(CheckpointError) as caught:
            produce(root / "out", **options)
        one_line(caught, root / "out", "another process")
        assert tree(root) == before
    is_whole(root / "out")


def test_a_second_writer_leaves_what_the_first_has_set_aside(root):
    """The first is between the two renames of -f."""
    out = old_output(root)
    with writer(out, "-f"):
        out.rename(root / ".out.replaced")
        with pytest.raises(CheckpointError) as caught:
            produce(out, force=True)
        one_line(caught, out)
        assert names(root) == [".out.partial", ".out.replaced"]
    assert (out / "data").read_bytes() == WHOLE


@pytest.mark.parametrize("resume", [False, True])
def test_two_that_find_the_same_leftover(root, monkeypatch, resume):
    """Both open what a killed one left; the other locks it first and starts clean: it must not be disturbed."""
    out = root / "out"
    killed(out, "a")
    lock = fcntl.flock
    with contextlib.ExitStack() as stack:

        def late(fd: int, operation: int) -> None:
            monkeypatch.setattr(staging.fcntl, "flock", lock)
            stack.enter_context(writer(out))
            lock(fd, operation)

        monkeypatch.setattr(staging.fcntl, "flock", late)
        with pytest.raises(CheckpointError) as caught:
            produce(out, resume=resume)
        one_line(caught, out)
    is_whole(out)


# ---------------------------------------------------------------- kills and resuming


def test_what_a_killed_one_left_is_removed_by_the_next(root):
    partial = killed(root / "out", "c")
    (partial / "junk").write_text("of another version")
    assert names(root) == [".out.partial"]
    assert produce(root / "out") == list("abcd")
    is_whole(root / "out")


@pytest.mark.parametrize("end", ["kill", "term"])
def test_resume_keeps_what_is_finished(root, end):
    process = child(root / "out", "b", end)
    _, errors = process.communicate()
    if end == "term":
        assert process.returncode == 128 + signal.SIGTERM
        assert "--resume" in errors and errors.splitlines()[-1] == "-c: error: interrupted"
    assert produce(root / "out", resume=True) == ["c", "d"]
    is_whole(root / "out")


def test_resume_several_times(root):
    target = root / "out"
    killed(target, "a")
    killed(target, "c", "--resume")
    with pytest.raises(KeyboardInterrupt):
        produce(target, resume=True, after={"b": throw(KeyboardInterrupt())})
    assert produce(target, resume=True) == ["d"]
    is_whole(target)


def test_resume_without_a_leftover(root):
    assert produce(root / "out", resume=True) == list("abcd")
    is_whole(root / "out")


@pytest.mark.parametrize("place", [0, 1199, 1200, 3199])
def test_resume_does_an_altered_item_again(root, place):
    partial = killed(root / "out", "b")
    with open(partial / "data", "r+b") as file:
        file.seek(place)
        file.write(b"?")
    again = "a" if place < len(ITEMS["a"]) else "b"
    assert produce(root / "out", resume=True) == [again, "c", "d"]
    is_whole(root / "out")


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 1500), Path.unlink, lambda p: os.truncate(p, 10**6)])
def test_resume_with_a_file_of_another_length(root, damage):
    partial = killed(root / "out", "b")
    damage(partial / "data")
    produce(root / "out", resume=True)
    is_whole(root / "out")


@pytest.mark.parametrize("resume", [True, False])
def test_resume_of_another_job_starts_clean(root, capsys, resume):
    partial = killed(root / "out", "b")
    (partial / "junk").write_text("of another job")
    assert produce(root / "out", job={**JOB, "number": 2}, resume=resume) == list("abcd")
    assert ("starting clean" in capsys.readouterr().err) == resume
    is_whole(root / "out")


def journal_lines(partial: Path) -> list[bytes]:
    return (partial / JOURNAL).read_bytes().splitlines(keepends=True)


def test_resume_with_a_cut_journal(root, tmp_path):
    """Cut at every byte of the last line, down to none of it."""
    left = killed(root / "out", "b")
    lines = journal_lines(left)
    assert len(lines) == 3
    for number, cut in enumerate(range(len(lines[-1]) - 1)):
        target = tmp_path / str(number) / "out"
        shutil.copytree(left, target.with_name(".out.partial"))
        os.truncate(target.with_name(".out.partial") / JOURNAL, sum(map(len, lines[:-1])) + cut)
        assert produce(target, resume=True) == ["b", "c", "d"]
        is_whole(target)
        shutil.rmtree(target.parent)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"\xff\xfe\0\1garbage",
        b"null\n",
        b'{"tool": "te',
        b"[" * 300_000,
        bytes(100_000),
        json.dumps([JOB]).encode(),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_journal_of_garbage_starts_clean(root, content):
    partial = killed(root / "out", "b")
    (partial / JOURNAL).write_bytes(content)
    assert produce(root / "out", resume=True) == list("abcd")
    is_whole(root / "out")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "17",
        '"ab"',
        "[]",
        '["a"]',
        '["a", null]',
        '["a", [null]]',
        '["a", [[]]]',
        '["a", [["data", 0, 1200]]]',
        '["a", [["nowhere", 0, 1200, 0]]]',
        '["a", [["data", "x", 1200, 0]]]',
        '["a", [["data", 0, 1200, 0]]]',
        '["a", [["data", 0, 1000000000000, 0]]]',
        '["a", [["data", NaN, 1200, 0]]]',
        '["a", [["data", Infinity, 1200, 0]]]',
        '["a", [["data", -5, 1200, 0]]]',
        '["a", [["data", 1' + 30 * "0" + ", 1200, 0]]]",
        "[" * 300_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_journal_with_a_line_of_garbage(root, line):
    """The line is about `a`, whose bytes are not there."""
    partial = killed(root / "out", "b")
    job, _, b = journal_lines(partial)
    (partial / JOURNAL).write_bytes(job + line.encode() + b"\n" + b)
    with open(partial / "data", "r+b") as file:
        file.write(bytes(1200))
    produce(root / "out", resume=True)
    is_whole(root / "out")


# ---------------------------------------------------------------- killed between the two renames of -f


def set_aside(root: Path) -> Path:
    out = old_output(root)
    out.rename(root / ".out.replaced")
    return out


@pytest.mark.parametrize("resume", [False, True])
def test_what_was_set_aside_comes_back(root, resume):
    out = set_aside(root)
    with pytest.raises(CheckpointError) as caught:  # without -f it is in the way again
        produce(out, resume=resume)
    one_line(caught, out, "not empty")
    assert tree(root) == {"out": None, **{f"out/{name}": content for name, content in OLD.items()}}


def test_what_was_set_aside_comes_back_if_the_next_fails(root):
    out = set_aside(root)
    with pytest.raises(RuntimeError):
        produce(out, force=True, after={"a": throw(RuntimeError())})
    assert tree(root) == {"out": None, **{f"out/{name}": content for name, content in OLD.items()}}


def test_what_was_set_aside_is_replaced_by_the_next(root):
    produce(set_aside(root), force=True)
    is_whole(root / "out")


def test_what_was_set_aside_is_removed_beside_its_successor(root):
    """Killed after the second rename."""
    set_aside(root)
    (root / "out").mkdir()
    (root / "out" / "new").write_text("new")
    with pytest.raises(CheckpointError, match="not empty"):
        produce(root / "out")
    assert (root / "out" / "new").read_text() == "new"
    produce(root / "out", force=True)
    is_whole(root / "out")


def test_what_was_set_aside_survives_an_empty_directory(root):
    """A script's `mkdir -p out` before the next run is no successor."""
    out = set_aside(root)
    out.mkdir()
    with contextlib.suppress(CheckpointError):
        produce(out, after={"a": throw(CheckpointError("mine"))})
    kept = out if (out / "sub").exists() else root / ".out.replaced"
    assert kept.exists() and tree(kept) == OLD


# ---------------------------------------------------------------- disks


def test_too_little_space_is_said_before_anything_is_written(root, monkeypatch):
    usage = type(shutil.disk_usage(root))(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError) as caught:
        produce(root / "new" / "out")
    one_line(caught, root / "new" / "out", "more are needed", "100 free")
    assert names(root) == []


def test_what_is_staged_counts_when_resuming(root, monkeypatch):
    kind = type(shutil.disk_usage(root))

    def usage(free: int) -> None:
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: kind(10**9, 10**9 - free, free))

    partial = killed(root / "out", "c")
    staged = (partial / "data").stat().st_blocks * 512
    assert 0 < staged
    usage(0)
    job = {**JOB, "size": 10**6}
    with pytest.raises(CheckpointError, match="more are needed"), Staging(root / "out", job=job, size=10**6):
        pass
    assert names(root) == []

    partial = killed(root / "out", "c")
    with (
        pytest.raises(CheckpointError, match="more are needed"),
        Staging(root / "out", job=JOB, size=10**6, resume=True),
    ):
        pass
    assert (partial / "data").exists()  # three items are finished: they are kept for when there is space
    usage(max(0, SIZE - staged))
    assert produce(root / "out", resume=True) == ["d"]
    is_whole(root / "out")


FILL = """
import resource, sys
from pathlib import Path
from tools.checkpoint import cli
from tools.checkpoint.staging import Staging

limit, how = int(sys.argv[2]), sys.argv[3]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def main(_):
    with Staging(Path(sys.argv[1]), job={}, size=0) as out:
        if how == "create":
            out.create("data", 3 << 20)
        elif how == "bytes":
            out.write_bytes("data", bytes(3 << 20))
        elif how == "copy":
            out.copy(Path(sys.argv[4]), "data")
        else:
            out.create("data", 0)
            for i in range(24):
                out.write("data", i << 17, memoryview(bytes(1 << 17)))
        out.publish()
    return 0

sys.exit(cli.run(main))
"""


@pytest.fixture
def big(tmp_path) -> Path:
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    return tmp_path / "big"


@pytest.mark.parametrize("how", ["write", "create", "bytes", "copy"])
def test_a_failing_write_is_one_line(root, big, how):
    result = run(sys.executable, "-c", FILL, root / "new" / "out", 1 << 20, how, big, cwd=REPO)
    assert result.returncode == 1 and not result.stdout
    one_line(result.stderr, "-c: error: ", os.strerror(errno.EFBIG), root / "new")
    assert names(root) == []


def in_small_disk(mount: Path, options: str, *command: object) -> subprocess.CompletedProcess:
    """Run a command with a tmpfs at `mount` that only it sees; what it leaves there goes to stdout. Skips where not
    permitted.
    """
    script = 'mount -t tmpfs -o "$1" none "$2" || exit 99; at="$2"; shift 2; "$@"; code=$?; ls -A "$at"; exit $code'
    result = run("unshare", "-rm", "sh", "-c", script, "sh", options, mount, *command, cwd=REPO)
    if result.returncode == 99 or result.stderr.startswith("unshare:"):
        pytest.skip(f"no tmpfs can be mounted here: {result.stderr.strip()[:100]}")
    return result


@pytest.mark.parametrize("how", ["write", "bytes", "copy"])
def test_a_full_disk_is_one_line(root, big, how):
    result = in_small_disk(root, "size=1m", sys.executable, "-c", FILL, root / "new" / "out", 0, how, big)
    assert result.returncode == 1
    one_line(result.stderr, "-c: error: ", "the disk is full", root / "new")
    assert result.stdout == ""


def test_a_read_only_disk_is_one_line(root, big):
    result = in_small_disk(root, "size=1m,ro", sys.executable, "-c", FILL, root / "new" / "out", 0, "write")
    assert result.returncode == 1
    one_line(result.stderr, "-c: error: ", root / "new" / "out", os.strerror(errno.EROFS))
    assert result.stdout == ""


@pytest.mark.parametrize("target", ["/sys/infir2/out", "/proc/infir2/out", "/proc/self/out", "/dev/null/out"])
def test_an_unwritable_place_is_one_line(target):
    with pytest.raises(CheckpointError) as caught:
        produce(Path(target))
    one_line(caught, Path(os.path.realpath(target)))
    assert not Path(target).parent.is_dir() or not Path(target).exists()
