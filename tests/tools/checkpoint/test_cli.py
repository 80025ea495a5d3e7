"""Exits and options that the commands share."""

from __future__ import annotations

import argparse
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, run
from tests.tools import models
from tools.checkpoint import cli
from tools.checkpoint.errors import CheckpointError


def failing(error: BaseException):
    def main(argv: object) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CheckpointError("a: wrong\n key"), 1, "a: wrong key"),
        (OSError(28, "No space left on device", "x/y"), 1, "x/y: the disk is full"),
        (PermissionError(13, "Permission denied", "z"), 1, "z: Permission denied"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (cli.Interrupted(signal.SIGTERM), 143, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(capsys, error, status, message):
    assert cli.run(failing(error)) == status
    program = os.path.basename(sys.argv[0])
    assert capsys.readouterr().err == f"{program}: error: {message}\n"


def test_trouble_has_a_status_of_its_own(capsys):
    assert cli.run(failing(CheckpointError("a")), trouble=2) == 2


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert cli.run(lambda argv: 0) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "٣", str(2**60)])
def test_positive_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a positive integer"):
        cli.positive(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (397_400, "397.4 kB"), (3_087_000_000, "3.09 GB")]
)
def test_sizes_for_people(count, text):
    assert cli.size_text(count) == text


def test_a_reader_that_leaves_is_no_error(tmp_path):
    models.save(tmp_path / "a", models.TINY)
    command = f'"{sys.executable}" "{REPO}/tools/verify_checkpoint.py" "$0" "$0" --all | head -1'
    result = run("bash", "-c", command, tmp_path / "a")
    assert len(result.stdout.splitlines()) == 1 and result.stderr == ""


def test_a_terminal_shows_a_bar_with_bytes(tmp_path):
    source = models.save(tmp_path / "hf", models.TINY)
    words = [sys.executable, REPO / "tools/convert_hf_to_torch_dist.py", "--input-dir", source]
    shown = in_a_terminal([*words, "--output-dir", tmp_path / "out"])
    assert "converting: 100%" in shown and "kB/s" in shown.replace("MB/s", "kB/s")
    quiet = run(*words, "--output-dir", tmp_path / "out2")
    assert quiet.stderr == ""  # a log gets no bar of a run that is over in seconds


def in_a_terminal(words: list[object]) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(list(map(str, words)), stdout=theirs, stderr=theirs, stdin=theirs, cwd=Path.cwd())
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    return shown.decode()
