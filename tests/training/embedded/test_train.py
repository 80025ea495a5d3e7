"""train.py on real Ray: SFT and RL to their end, killed in the middle and going on exactly, and what is refused.

One run starts a Ray of its own, the others join a cluster, as a job does.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.conftest import REPO, ok, run
from tests.training.embedded import tiny
from tests.training.embedded.test_pretrain_gpt import scalars, state
from tools.checkpoint import torch_dist
from training.embedded import train

TRAIN = REPO / "training" / "embedded" / "train.py"
JOINED = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
KEEPER = """
import sys, ray
ray.init(address="local", include_dashboard=False, _temp_dir=sys.argv[1])
print("cluster", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
# 96 conversations are twelve rollouts of eight, twice; a checkpoint after every sixth and at the end of an epoch.
SFT = ["--num-epoch", 2, "--rollout-batch-size", 8, "--global-batch-size", 4, "--rollout-shuffle", "--save-interval", 6]
SFT += ["--lr-decay-style", "cosine", "--min-lr", 1e-4, "--lr-warmup-fraction", 0.1]
SFT_LAST = 23
RL = ["--num-rollout", 12, "--save-interval", 4, "--rollout-batch-size", 4, "--n-samples-per-prompt", 8]
RL += ["--global-batch-size", 16, "--rollout-shuffle", "--over-sampling-batch-size", 6, "--use-tis", "--lr", 3e-4]
RL += ["--dynamic-sampling-filter-path", "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"]
RL += ["--rollout-temperature", 2, "--rollout-max-response-len", 8, "--eval-interval", 6]
RL_LAST = 11


# ---------------------------------------------------------------- processes


def children() -> dict[int, list[int]]:
    """Process ids by parent."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(") ", 1)[1].split()
        except OSError:
            continue
        found.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    by_parent, found = children(), [pid]
    for parent in found:
        found += by_parent.get(parent, [])
    return found[1:]


def title(pid: int) -> str:
    """What a process calls itself; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_until(condition, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short directory, as the paths of Ray's sockets have a limit."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(place) -> Iterator[tuple[str, int]]:
    """(address, process id) of a Ray that ends with this fixture."""
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(place / "ray")],
        env=environment(place) | JOINED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = []
    for line in keeper.stdout:
        seen.append(line)
        if line.startswith("cluster "):
            break
    else:
        pytest.fail("".join(seen))
    yield line.split()[1], keeper.pid
    keeper.communicate("")


def environment(place: Path) -> dict[str, str]:
    """On the CPU, where the same sums come out of the same numbers."""
    inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return inherited | {"HOME": str(place), "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}


class Job:
    """One directory of a run; `address` None: it starts a Ray of its own."""

    def __init__(self, out: Path, place: Path, address: str | None) -> None:
        self.out, self.env = out, environment(place) | {"TENSORBOARD_DIR": str(out / "tensorboard")}
        alone = {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(place / "own")}
        self.env |= JOINED | {"RAY_ADDRESS": address} if address else alone

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def command(self, argv: list[str], *flags: object) -> list[str]:
        """With where the run starts, as the launcher decides it from the tracker."""
        tracker = torch_dist.read_tracker(self.checkpoints)
        start = [] if tracker is None else ["--start-rollout-id", tracker + 1]
        places = ["--save", self.checkpoints, "--load", self.checkpoints, "--use-tensorboard", "--tb-project-name", "p"]
        return [sys.executable, str(TRAIN), *argv, *tiny.words(*places, *start, *flags)]

    def run(self, argv: list[str], *flags: object) -> subprocess.CompletedProcess:
        return run(*self.command(argv, *flags), env=self.env)

    def start(self, argv: list[str]) -> subprocess.Popen:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "stdout").open("w") as stdout, (self.out / "stderr").open("w") as stderr:
            return subprocess.Popen(self.command(argv), env=self.env, stdout=stdout, stderr=stderr, text=True)

    def start_until_saved(self, argv: list[str]) -> subprocess.Popen:
        """A run that has just written its first checkpoint."""
        process = self.start(argv)
        wait_until(
            lambda: "saved checkpoint" in (self.out / "stdout").read_text() or process.poll() is not None,
            "no checkpoint",
        )
        assert process.poll() is None, (self.out / "stderr").read_text()
        return process

    def result(self, last: int) -> tuple:
        """Everything that must not depend on an interruption: weights, optimizer, data position, scalars."""
        found = scalars(self.out, ignored=("perf/",))
        positions = sorted(path.name for path in (self.checkpoints / "rollout").iterdir())
        return state(self.out, last), positions, found


def same(found: tuple, expected: tuple) -> None:
    """With the names of what differs, and not every byte."""
    assert [key for key in expected[0] if found[0].get(key) != expected[0][key]] == []
    assert found[1] == expected[1]
    assert found[2].keys() == expected[2].keys()
    assert [key for key in expected[2] if found[2][key] != expected[2][key]] == []


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of an error, without what Ray says of itself."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    ray_says = re.compile(r"\d{4}-\d\d-\d\d |\x1b\[|\s*$")
    (line,) = [line for line in result.stderr.splitlines() if not ray_says.match(line)]
    return line


# ---------------------------------------------------------------- SFT


@pytest.fixture(scope="module")
def sft_argv(tmp_path_factory) -> list[str]:
    folder = tiny.run_folder(tmp_path_factory.mktemp("sft") / "it's a run")
    tiny.conversations(folder / "data.jsonl", 98)  # two more than twelve rollouts hold
    return tiny.without(tiny.argv(folder, *SFT, kind=tiny.SFT, precision="fp8"), "--num-rollout")


@pytest.fixture(scope="module")
def sft(sft_argv, tmp_path_factory, place, cluster) -> tuple[Job, subprocess.CompletedProcess]:
    job = Job(tmp_path_factory.mktemp("sft_whole"), place, cluster[0])
    return job, ok(job.run(sft_argv))


def test_sft_learns_and_says_so(sft):
    """Slime's log lines and TensorBoard names, a step being one of two in a rollout."""
    job, result = sft
    lines = result.stdout.splitlines()
    assert "rollouts 0 to 23, 48 optimizer steps" in lines
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step {number}" for number in range(48)]
    fields = ", ".join(f"'train/{name}': [0-9.e-]+" for name in ("loss", "grad_norm", "lr-pg_0", "lr-pg_1"))
    assert re.fullmatch(f"step 0: {{{fields}}}", steps[0])
    assert sum(line.startswith("rollout ") for line in lines) == 24
    saved = [line for line in lines if line.startswith("saved checkpoint ")]
    assert saved == [f"saved checkpoint {job.checkpoints}/iter_{n:07d} after rollout {n}" for n in (5, 11, 17, 23)]
    found = scalars(job.out)
    assert found.keys() == {
        *("train/loss", "train/grad_norm", "train/lr-pg_0", "train/lr-pg_1"),
        *("rollout/response_lengths", "rollout/total_lengths", "rollout/truncated"),
        *("perf/rollout_time", "perf/actor_train_time"),
    }
    assert sorted(found["train/loss"]) == list(range(48)) and sorted(found["rollout/truncated"]) == list(range(24))
    loss = found["train/loss"]
    assert sum(loss[step] for step in range(44, 48)) < 0.3 * sum(loss[step] for step in range(4))
    assert found["train/lr-pg_0"][47] == pytest.approx(1e-4)
    assert torch_dist.read_tracker(job.checkpoints) == SFT_LAST
    assert job.result(SFT_LAST)[1] == sorted(f"global_dataset_state_dict_{n}.pt" for n in (5, 11, 17, 23))


def test_sft_killed_goes_on_exactly(sft, sft_argv, tmp_path, place, cluster):
    """kill -9 of the driver, which takes the Ray that it has started with it (two agents of a few MB follow after a
    minute); then the command of a resume, here on another cluster.
    """
    job = Job(tmp_path / "killed", place, None)
    process = job.start_until_saved(sft_argv)
    started = [pid for pid in descendants(process.pid) if "ray" in title(pid) and "Agent" not in title(pid)]
    assert any("RolloutManager" in title(pid) for pid in started)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = torch_dist.read_tracker(job.checkpoints)
    assert reached < SFT_LAST, "it was killed too late"
    wait_until(lambda: not any("ray" in title(pid) for pid in started), "what the driver had started is still there")
    job = Job(tmp_path / "killed", place, cluster[0])
    result = ok(job.run(sft_argv))
    assert f"rollouts {reached + 1} to 23, 48 optimizer steps" in result.stdout
    assert f"started from {job.checkpoints}/iter_{reached:07d}, weights, optimizer and schedule" in result.stdout
    same(job.result(SFT_LAST), sft[0].result(SFT_LAST))


# ---------------------------------------------------------------- RL


@pytest.fixture(scope="module")
def rl_argv(tmp_path_factory) -> list[str]:
    """FP8 on both sides, two sets of held-out questions."""
    folder = tiny.run_folder(tmp_path_factory.mktemp("rl") / "a run", fp8=True)
    tiny.questions(folder / "held.jsonl", 8)
    held = ["--eval-prompt-data", "held", folder / "held.jsonl", "again", folder / "data.jsonl"]
    return tiny.argv(folder, *RL, *held, "--n-samples-per-eval-prompt", 2, precision="fp8")


@pytest.fixture(scope="module")
def rl(rl_argv, tmp_path_factory, place, cluster) -> tuple[Job, subprocess.CompletedProcess]:
    job = Job(tmp_path_factory.mktemp("rl_whole"), place, cluster[0])
    return job, ok(job.run(rl_argv))


def test_rl_says_what_it_does(rl):
    job, result = rl
    lines = result.stdout.splitlines()
    assert "rollouts 0 to 11, 24 optimizer steps" in lines
    assert "FP8 rounding: 14 of 15 linear layers in E4M3 blocks with power-of-two scales" in result.stdout
    assert [line.split(":")[0] for line in lines if line.startswith("eval ")] == ["eval 0", "eval 5", "eval 11"]
    assert "First rollout sample: " in result.stdout  # of the actor, through Ray
    found = scalars(job.out)
    assert found.keys() == {
        *(f"train/{name}" for name in ("loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl", "grad_norm")),
        *(f"train/{name}" for name in ("tis", "ois", "tis_clipfrac", "lr-pg_0", "lr-pg_1")),
        *(f"rollout/{name}" for name in ("raw_reward", "rewards", "log_probs", "rollout_log_probs", "truncated")),
        *(f"rollout/{name}" for name in ("response_lengths", "total_lengths", "kl_to_trainer", "mult_prob_error")),
        *(f"rollout/{name}" for name in ("dropped_groups", "raw_reward_drawn")),
        *(f"perf/{name}" for name in ("rollout_time", "actor_train_time", "tokens_per_gpu_per_sec")),
        *("eval/held", "eval/held-truncated_ratio", "eval/again", "eval/again-truncated_ratio"),
    }
    assert sorted(found["train/loss"]) == list(range(24)) and sorted(found["eval/held"]) == [0, 5, 11]
    assert all(0.0 < reward < 1.0 for reward in found["rollout/raw_reward"].values())
    assert sum(found["rollout/dropped_groups"].values()) > 0
    # What the rollouts ran on is the policy, in another rounding.
    assert all(1.0 < error < 1.3 for error in found["rollout/mult_prob_error"].values())
    assert torch_dist.read_tracker(job.checkpoints) == RL_LAST


def test_rl_killed_goes_on_exactly(rl, rl_argv, tmp_path, place, cluster):
    job = Job(tmp_path / "killed", place, cluster[0])
    process = job.start_until_saved(rl_argv)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert torch_dist.read_tracker(job.checkpoints) < RL_LAST, "it was killed too late"
    ok(job.run(rl_argv))
    same(job.result(RL_LAST), rl[0].result(RL_LAST))


def test_the_rollout_actor_killed_ends_the_run_and_the_next_one_completes_it(rl, rl_argv, tmp_path, place, cluster):
    def actors() -> set[int]:
        return {pid for pid in descendants(cluster[1]) if title(pid).startswith("ray::RolloutManager")}

    wait_until(lambda: not actors(), "the actors of the runs before are still there")
    job = Job(tmp_path / "killed", place, cluster[0])
    process = job.start_until_saved(rl_argv)
    (actor,) = actors()
    os.kill(actor, signal.SIGKILL)
    assert process.wait(120) == 1
    told = (job.out / "stderr").read_text()
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert line == "error: the rollout actor died: The actor died unexpectedly before finishing this task."
    assert "Traceback" not in told
    assert torch_dist.read_tracker(job.checkpoints) < RL_LAST, "it was killed too late"
    ok(job.run(rl_argv))
    same(job.result(RL_LAST), rl[0].result(RL_LAST))


# ---------------------------------------------------------------- what is refused


def test_an_error_of_the_actor_is_one_line(sft_argv, rl_argv, tmp_path, place, cluster):
    """At its start, where Ray would make pages of it, and in the middle of a rollout."""
    job = Job(tmp_path / "run", place, cluster[0])
    missing = f"{tmp_path}/no.jsonl"
    assert refused(job.run(sft_argv, "--prompt-data", missing)) == f"{missing}: No such file or directory"
    line = refused(job.run(rl_argv, "--rollout-max-response-len", 250, "--eval-max-response-len", 8))
    assert line == (
        "--rollout-max-response-len: expected at most 246, since a prompt has 10 tokens and the model 256 positions, "
        "found 250"
    )
    assert not job.checkpoints.exists()


def test_what_is_wrong_with_the_command_is_told_before_ray_is_started(rl_argv, tmp_path, capsys):
    def told(*flags: object) -> str:
        assert train.main([*rl_argv, *tiny.words(*flags)]) == 1 and not ray.is_initialized()
        return capsys.readouterr().err

    assert told("--partial-rollout", "--num-layers", 0) == (
        "error: --partial-rollout: the embedded engine does not do this; run it on slime (--engine megatron)\n"
        "error: --num-layers: expected at least 1, found 0\n"
    )
    torch_dist.write_tracker(tmp_path, 3)
    assert told("--load", tmp_path, "--start-rollout-id", 9) == (
        f"error: --start-rollout-id: expected 4, one more than the tracker in {tmp_path} says, found 9\n"
    )
    (tmp_path / torch_dist.TRACKER).write_text("what")
    assert told("--load", tmp_path) == (
        f"{tmp_path}/{torch_dist.TRACKER}: expected a positive iteration or 'release', found 'what'\n"
    )
