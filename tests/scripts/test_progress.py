"""What a program that writes to a log is doing: a line now and then, or one kept up to date on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.conftest import REPO, ok, run

PROGRESS = REPO / "scripts" / "lib" / "progress.sh"
MEGATRON = (
    " [2026-11-26 09:37:08] iteration      189/     400 | consumed samples:         1512 | elapsed time per iteration "
    "(ms): 203.1 | learning rate: 1.000000E-03 | global batch size:     8 | lm loss: 3.406087E+00 | loss scale: 1.0 |"
)
SFT = "rollouts 0 to 199, 200 optimizer steps\nstep 46: {'train/loss': 0.0731, 'train/grad_norm': 0.0127}"
ROLLOUT = "rollout 46: {'perf/rollout_time': 0.01, 'rollout/response_lengths': 28.6, 'rollout/truncated': 0}"
RL = SFT + "\nrollout 46: {'rollout/dropped_groups': 4, 'rollout/raw_reward_drawn': 0.83125, 'perf/rollout_time': 2.04}"
EVALSCOPE = (
    "\rEvaluating[aime24]:  55%|█████▌    | 110/200 [00:31<00:22,  3.98it/s]\x1b[A2026-11-26 09:51:29,985 - httpx2 - "
    "INFO: HTTP Request: POST http://127.0.0.1:22353/v1/chat/completions\n2026-11-26 - \x1b[32mINFO\x1b[0m: more"
)


def latest(text: str, folder: Path, before: str = "") -> str:
    log = folder / "it's a log"
    log.write_text(before + text)
    script = 'source "$1"; set -euo pipefail; latest "$2" "$3" 60'
    command = ("bash", "-c", script, "-", PROGRESS, log, len(before.encode()))
    shown = ok(run(*command, env={"LANG": "C.UTF-8"}))
    assert shown.stderr == ""
    return shown.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (MEGATRON, "iteration 189 of 400, loss 3.406\n"),
        (f"{SFT}\n{ROLLOUT}\n", "step 47 of 200, loss 0.0731\n"),
        (RL, "rollout 47 of 200, reward 0.83125\n"),
        (RL.replace("rollouts 0 to 199", "more"), "rollout 47, reward 0.83125\n"),
        (EVALSCOPE, "answer 110 of 200\n"),
        ("one\n\x1b[32mtwo\x1b[0m\x07\n\n----\n", "two\n"),
        ("x" * 70, "x" * 60 + "\n"),
        ("", "no word yet\n"),
    ],
)
def test_the_latest_line(tmp_path, text, shown):
    assert latest(text, tmp_path) == shown


def test_what_the_log_held_before_does_not_count(tmp_path):
    assert latest("new\n", tmp_path, before=f"ä{MEGATRON}\n") == "new\n"


@pytest.mark.parametrize("cut", range(3))
def test_a_log_that_is_cut_within_a_character(tmp_path, cut):
    """As the last 3000 bytes of a log may be: grep takes such text for binary, unless told otherwise."""
    assert latest("█" * 1000 + "52%\n" + "x" * cut + "\nnew\n", tmp_path) == "new\n"


SHOW = r"""
set -euo pipefail
source "$1"
exec {LOCK_FD}>>"$2.lock"
flock --nonblock "$LOCK_FD"
start_progress "$2" 0
for n in 1 2 3 4; do printf "part $n%080d\n" 0 >>"$2"; sleep 1; done
ls -l "/proc/$PROGRESS/fd" | grep -q '[.]lock$' && echo 'holds the lock'
stop_progress
echo end
"""


def test_lines_where_there_is_no_terminal(tmp_path):
    result = ok(run("bash", "-c", SHOW, "-", PROGRESS, tmp_path / "log", env={"PROGRESS_SECONDS": "2"}))
    shown = result.stdout.splitlines()
    assert shown[-1] == "end" and 1 <= len(shown) - 1 <= 2 and result.stderr == ""
    assert all(re.fullmatch(r"  0:0[2-5]  part [2-4]0{80}", line) for line in shown[:-1])


def test_one_line_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    env = {"PATH": os.environ["PATH"], "TERM": "xterm"}
    words = ["bash", "-c", SHOW, "-", str(PROGRESS), str(tmp_path / "log")]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1000)
        except OSError:  # its end is closed
            break
    assert process.wait() == 0
    *updates, last = shown.decode().split("\r\x1b[K")
    assert len(updates) >= 3 and last.strip() == "end"
    assert all(re.fullmatch(r"(  0:0\d  part \d0{42})?", line) for line in updates), updates


def test_it_ends_with_its_script(tmp_path):
    script = 'source "$1"; start_progress "$2" 0; kill -9 $$'
    (tmp_path / "log").touch()
    killed = subprocess.run(["bash", "-c", script, "-", PROGRESS, tmp_path / "log"], stdout=subprocess.PIPE, timeout=5)
    assert killed.returncode == -9  # and nobody holds its stdout, or this would have waited
