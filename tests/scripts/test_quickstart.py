"""The one command: it trains and reports, goes on after a kill at any moment, and does nothing when all is done."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import browser
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


def started(stdout: str) -> list[str]:
    """The stages that were announced."""
    return re.findall(r"^== \d+/\d+ (\w+): .+$", stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[Path, float, str]:
    """A quickstart that nothing interrupted, its seconds, and what it showed."""
    folder = tmp_path_factory.mktemp("quickstart")
    start = time.monotonic()
    result = ok(quickstart(folder / "out it's", *SHORT, cwd=folder))
    assert result.stderr == ""
    return folder / "out it's", time.monotonic() - start, result.stdout


@pytest.fixture(scope="module")
def reference(shown) -> tuple[Path, float]:
    return shown[:2]


def test_what_it_shows(shown):
    out, _, text = shown
    assert started(text) == STAGES and re.findall(r"^== (\w+) took \d+:\d\d$", text, re.MULTILINE) == STAGES[1:]
    assert "\x1b" not in text and "\r" not in text
    assert max(map(len, text.splitlines())) < 200 and len(text.splitlines()) < 200
    *_, accuracies, precisions, last = text.splitlines()
    assert re.search(r": \d+\.\d% after pre-training, \d+\.\d% after SFT, \d+\.\d% after RL\.$", accuracies)
    assert precisions.startswith("FP8 against BF16: held-out loss ")
    assert last == f"report: {out}/report.html, one file for any browser"


def test_all_is_in_its_log(shown):
    out, _, _ = shown
    log = (out / "quickstart.log").read_text()
    assert re.findall(r"^== (\w+), \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", log, re.MULTILINE) == STAGES[1:]
    assert f"iteration {ITERATIONS:8d}/{ITERATIONS:8d}" in log and "Evaluating[aime24]" in log
    assert "\x1b" not in log


def test_it_ends_with_a_report(reference):
    out, _ = reference
    report = (out / "report.md").read_text()
    assert report.startswith("# The InfiR2 recipe in miniature\n")
    assert f"{ITERATIONS} iterations" in report and "| FP8 | " in report and "| BF16 | " in report
    assert "FP8 rounding: 28 of 29 linear layers" in report
    assert "half of the answers are wrong on purpose" in report
    table = re.findall(r"^\| (.+?) \| \d+\.\d%\s\(.*\) \| \d+\.\d%\s\(.*\) \|$", report, re.MULTILINE)
    assert len(table) == 7 and [title for title in table if "FP8" in title] == ["SFT stage 2, cast to FP8"]
    assert f"| 1 | {ROLLOUTS} | " in report and f"| 2 | {ROLLOUTS} | " in report
    assert "| arithmetic | BF16 | 2 x 4 | " in report and "| arithmetic | FP8 | 2 x 4 | " in report
    assert re.search(r"^\| arithmetic \| BF16 \| FP8 \| 2 \| .* \| (inside noise|a difference) \|$", report, re.M)
    for name in ("report.png", "report_fine_tuning.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in report
    assert not list(out.glob(".*partial*"))


def test_it_can_be_repeated_from_the_report(reference, tmp_path):
    """The command is the one that ran; the commands of "Next" launch."""
    out, _ = reference
    repeat, again, tensorboard, decay, launchers = re.findall(
        r"^```bash\n(.*?)^```", (out / "report.md").read_text(), re.DOTALL | re.MULTILINE
    )
    *checkout, command = repeat.splitlines()
    head = run("git", "rev-parse", "--short=12", "HEAD", cwd=REPO).stdout.strip()
    assert checkout == ([f"git checkout {head}"] if head else [])
    assert "SEED=1236 bash scripts/quickstart.sh -- '--train-iters' '16'" in command
    wanted = ok(quickstart(Path("exp/repeat"), "--dry-run", *SHORT, cwd=REPO)).stdout
    got = ok(run("bash", "-c", command.replace(" -- ", " --dry-run -- "), env={"DYNAMIC_SAMPLING": "0"}, cwd=REPO))
    assert got.stdout == wanted and "exp/repeat/cpt_fp8" in wanted
    assert again.startswith(f"OUT_DIR={shlex.quote(str(out))} bash scripts/quickstart.sh --from rl_stage1 --again\n")
    assert launchers.count(" --dry-run\n") == 3
    assert tensorboard == f".venv/bin/tensorboard --host 127.0.0.1 --logdir {shlex.quote(str(out))}\n"
    planned = ok(run("bash", "-c", f"{decay.strip()} --dry-run", env={"OUT_DIR": str(tmp_path / "x")}, cwd=REPO))
    assert "decay of " in planned.stderr and "checkpoints from 4" in planned.stderr


@browser.needed
def test_its_page_in_a_browser(reference):
    out, _ = reference
    with browser.chromium() as chromium:
        browser.check_page(chromium, out / "report.html", figures=6)
        with browser.opened(chromium, out / "report.html") as page:
            tables = "".join(page.locator("table").all_inner_texts())
    for file in (out / "accuracy").iterdir():
        for kind in ("greedy", "sampled"):
            assert f"{json.loads(file.read_text())[kind]['accuracy']:.1%}\u00a0" in tables.replace(" ", "\u00a0")


def test_again_does_nothing(reference):
    out, _ = reference

    def files() -> list[tuple[Path, int]]:
        found = (path for path in out.rglob("*") if path.is_file() and path.name != "quickstart.log")
        return sorted((path, path.stat().st_mtime_ns) for path in found)

    before, log = files(), (out / "quickstart.log").stat().st_size
    start = time.monotonic()
    result = ok(quickstart(out, *SHORT))
    print(f"re-run: {time.monotonic() - start:.1f} s")
    assert files() == before
    assert re.findall(r"^== (?:\d+/\d+ )?(\w+): done before$", result.stdout, re.MULTILINE) == STAGES
    said = (out / "quickstart.log").read_bytes()[log:].decode()
    assert said.count("nothing to do: ") == 9  # one for each run, three of them for the one from random weights


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
    assert "waiting for it to end" in result.stderr and "== cpt_fp8: done before\n" in result.stdout
    assert torch_dist.read_tracker(out / "cpt_fp8" / "checkpoints") == ITERATIONS


def test_interrupted_it_says_so_and_counts_the_time(reference, tmp_path):
    whole, _ = reference
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tokenizer", "data"):
        shutil.copytree(whole / name, out / name)
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OUT_DIR": str(out), **SHORT_ENV}
    words = ["bash", str(QUICKSTART), "--only", "cpt_fp8", *SHORT, "--train-iters", "100000"]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    log = out / "quickstart.log"
    while not log.exists() or "iteration        1/" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, said = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"stopped in stage cpt_fp8: stopped: saved at iteration \d+ of 100000; run .*\n", said.decode())
    stage, seconds, commit, command = (out / "stages.tsv").read_text().rstrip("\n").split("\t")
    assert stage == "cpt_fp8" and int(seconds) > 0 and command.endswith("'--train-iters' '100000'")


def test_interrupted_in_the_evaluation_both_of_its_runs_stop(reference, tmp_path):
    whole, _ = reference
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tokenizer", "arithmetic", "rl_stage2"):
        shutil.copytree(whole / name, out / name)
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OUT_DIR": str(out), **SHORT_ENV}
    words = ["bash", str(QUICKSTART), "--only", "evaluation"]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    log = out / "quickstart.log"
    while not log.exists() or log.read_text().count("starting the server") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and said.decode().startswith("stopped in stage evaluation: ")
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(out) not in left
    assert not list(out.glob("evaluation/*/summary.json"))


def test_a_stage_that_fails(tmp_path):
    out = tmp_path / "it's out"
    result = quickstart(out, "--only", "data")
    assert result.returncode == 1 and result.stdout.splitlines() == [result.stdout.strip()]
    *causes, told = result.stderr.splitlines()  # two conversions at a time, in any order
    assert [Path(re.search(r"--input: (.+) not found", cause)[1]).name for cause in sorted(causes)] == [
        "pretrain.jsonl",
        "corpus.jsonl",
    ]
    assert all(cause in (out / "quickstart.log").read_text() for cause in causes)
    assert told == f"error: stage data failed with status 1; all that it printed: {out}/quickstart.log"


def test_an_installation_that_fails_is_not_taken_for_one(tmp_path):
    """A copy of the scripts, whose .venv is made for real; no package can be had."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    shutil.copy(REPO / "requirements.txt", tmp_path)
    env = {"PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    for _ in range(2):
        result = run("bash", tmp_path / "scripts" / "quickstart.sh", "--only", "install", env=env)
        assert result.returncode == 1 and "No matching distribution found for torch" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: stage install failed with status 1; ")
        assert not list((tmp_path / ".venv").glob(".*installed"))


def test_stages(tmp_path):
    assert ok(quickstart(tmp_path / "x", "--list")).stdout.split() == STAGES
    printed = ok(quickstart(tmp_path / "x", "--dry-run")).stdout
    assert started(printed) == STAGES
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
    made = {"corpus.jsonl", "arithmetic", "tokenizer", "quickstart.log", "stages.tsv", ".lock"}
    assert {path.name for path in out.iterdir()} == made
    assert [line.split("\t")[0] for line in (out / "stages.tsv").open()] == ["corpus", "arithmetic", "tokenizer"]
    assert (out / "tokenizer" / "tokenizer.json").stat().st_mtime > (whole / "report.md").stat().st_mtime
