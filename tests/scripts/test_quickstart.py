"""The one command: it trains and reports, goes on after a kill at any moment, and does nothing when all is done."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO, ok, run
from tests.training.embedded.test_pretrain_gpt import kill_session, state
from tools.checkpoint import torch_dist

QUICKSTART = REPO / "scripts" / "quickstart.sh"
STAGES = (
    "install corpus arithmetic tokenizer data cpt_fp8 cpt_bf16 sft_stage1 sft_stage2 sft_scratch rollout_model "
    "rl_stage1 rl_stage2 accuracy evaluation report"
).split()
ITERATIONS, ROLLOUTS = 16, 4
RUNS = {
    **{name: ITERATIONS for name in ("cpt_fp8", "cpt_bf16")},
    **{name: ROLLOUTS - 1 for name in ("sft_stage1", "sft_stage2", "sft_scratch2", "rl_stage1", "rl_stage2")},
}
# The real stages on the real corpus; only the training is short. A model that has learned so little is never right: the
# groups of RL that have no signal are kept.
SHORT_ENV = {
    "ARITHMETIC_FLAGS": "--pretrain 2000 --stage1 256 --stage2 128 --rl 64 --validation 4 --held-out 8 --benchmark 2",
    "SFT_FLAGS": f"--num-rollout {ROLLOUTS} --save-interval 2",
    "RL_FLAGS": f"--num-rollout {ROLLOUTS} --save-interval 2 --eval-interval 2 --rollout-max-response-len 8",
    "DYNAMIC_SAMPLING": "0",
}
SHORT = [
    *("--", "--train-iters", str(ITERATIONS), "--lr-warmup-iters", "2", "--lr-wsd-decay-iters", "8"),
    *("--save-interval", "4", "--eval-interval", "8", "--eval-iters", "2"),
]


def quickstart(out: Path, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return run("bash", QUICKSTART, *flags, env={"OUT_DIR": str(out), **SHORT_ENV}, cwd=cwd)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, float]:
    """A quickstart that nothing interrupted, and its seconds."""
    folder = tmp_path_factory.mktemp("quickstart")
    start = time.monotonic()
    ok(quickstart(folder / "out it's", *SHORT, cwd=folder))
    return folder / "out it's", time.monotonic() - start


def test_it_ends_with_a_report(reference):
    out, _ = reference
    report = (out / "report.md").read_text()
    assert report.startswith("# Continual pre-training in miniature")
    assert f"{ITERATIONS} iterations" in report and "| FP8 | " in report and "| BF16 | " in report
    assert "FP8 rounding: 28 of 29 linear layers" in report
    assert "half of the answers are wrong on purpose" in report
    table = re.findall(r"^\| (.+?) \| (BF16|FP8) \| \d+\.\d% \(.*\) \| \d+\.\d% \(.*\) \|$", report, re.MULTILINE)
    assert [precision for _, precision in table] == ["BF16", "BF16", "BF16", "BF16", "FP8", "BF16", "BF16"]
    assert f"| 1 | {ROLLOUTS} | " in report and f"| 2 | {ROLLOUTS} | " in report
    assert "| arithmetic | BF16 | 2 x 4 | " in report and "| arithmetic | FP8 | 2 x 4 | " in report
    assert re.search(r"^\| arithmetic \| BF16 \| FP8 \| 2 \| .* \| (inside noise|a difference) \|$", report, re.M)
    for name in ("report.png", "report_fine_tuning.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in report
    assert not list(out.glob(".*partial*"))


def test_again_does_nothing(reference):
    out, _ = reference
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file())
    start = time.monotonic()
    result = ok(quickstart(out, *SHORT))
    print(f"re-run: {time.monotonic() - start:.1f} s")
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()) == before
    assert result.stdout.count("done before") == 9 and result.stdout.count("nothing to do") == 0
    assert result.stderr.count("nothing to do") == 9  # one for each run, three of them for the one from random weights


def test_killed_at_three_random_points_it_ends_with_the_same_weights(reference, tmp_path):
    whole, seconds = reference
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}, {seconds:.0f} s uninterrupted")
    points = [random.Random(seed + n).uniform(0.0, seconds) for n in range(3)]
    out = tmp_path / "out"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "PYTHON": sys.executable,
        "OUT_DIR": str(out),
        **SHORT_ENV,
    }
    for point in points:
        process = subprocess.Popen(
            ["bash", str(QUICKSTART), *SHORT],
            env=env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(point)
        except subprocess.TimeoutExpired:
            kill_session(process.pid)
            process.wait()
    ok(quickstart(out, *SHORT))
    for name, last in RUNS.items():
        assert state(out / name, last) == state(whole / name, last), name
    for file in (whole / "accuracy").iterdir():
        ours, theirs = (json.loads((folder / "accuracy" / file.name).read_text()) for folder in (out, whole))
        assert ours | {"checkpoint": ""} == theirs | {"checkpoint": ""}, file.name
    assert (out / "report.md").exists()


def test_only_the_launcher_killed_the_orphan_is_waited_for(reference, tmp_path):
    """kill -9 of the script alone leaves its child at work: the next call must not work beside it."""
    whole, _ = reference
    out = tmp_path / "out"
    out.mkdir()
    for name in ("corpus.jsonl", "arithmetic", "tokenizer", "data"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, out / name)
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OUT_DIR": str(out), **SHORT_ENV}
    process = subprocess.Popen(
        ["bash", str(QUICKSTART), "--only", "cpt_fp8", *SHORT],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "cpt_fp8" / "logs" / "train_node0.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    result = ok(quickstart(out, "--only", "cpt_fp8", *SHORT))
    assert "waiting for it to end" in result.stderr and "nothing to do" in result.stderr
    assert torch_dist.read_tracker(out / "cpt_fp8" / "checkpoints") == ITERATIONS


def test_stages(tmp_path):
    assert ok(quickstart(tmp_path / "x", "--list")).stdout.split() == STAGES
    printed = ok(quickstart(tmp_path / "x", "--dry-run")).stdout
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("== ")] == STAGES
    printed = ok(quickstart(tmp_path / "x", "--dry-run", "--from", "cpt_fp8")).stdout
    assert "corpus.py" not in printed and "PRECISION=fp8" in printed and "report.py" in printed
    printed = ok(quickstart(tmp_path / "x", "--dry-run", "--only", "corpus")).stdout
    assert printed.count("== ") == 1 and "corpus.py" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from", "sft"], "sft: expected a stage of: install corpus arithmetic"),
        (["--only"], "--only: expected the name of a stage"),
        (["--quick"], "--quick: unknown option"),
        (["--from", "data", "--only", "data"], "found both"),
    ],
)
def test_wrong_calls(tmp_path, flags, message):
    result = quickstart(tmp_path / "x", *flags)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_again_throws_away_what_follows(reference, tmp_path):
    whole, _ = reference
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    ok(quickstart(out, "--only", "tokenizer", "--again", *SHORT))
    assert (out / "corpus.jsonl").exists() and (out / "tokenizer" / "tokenizer.json").exists()
    assert (out / "arithmetic").exists()
    left = {path.name for path in out.iterdir()} - {"corpus.jsonl", "arithmetic", "tokenizer", ".lock"}
    assert left == set(), left
    assert (out / "tokenizer" / "tokenizer.json").stat().st_mtime > (whole / "report.md").stat().st_mtime
