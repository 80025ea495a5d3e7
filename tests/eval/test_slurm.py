"""The four scripts as jobs of a real Slurm: done, failed, server dead, cancelled, out of time, requeued."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.eval import samples, slurm
from tests.eval.conftest import BENCHMARKS, Evaluation, processes_with, wait_until
from tests.eval.test_eval_scripts import own  # noqa: F401  a fixture
from tests.eval.test_transformers_serve import SHORT

pytestmark = pytest.mark.skipif(
    bool(slurm.absent()),
    reason=f"Slurm is not installed ({', '.join(slurm.absent())}); bash tests/eval/install_slurm.sh",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    place = Path(tempfile.mkdtemp(dir="/tmp", prefix="slurm"))
    with slurm.running(place) as started:
        yield started
    shutil.rmtree(place, ignore_errors=True)


def submit(cluster: slurm.Slurm, one: Evaluation, *flags: object, **env: object) -> int:
    one.out.parent.mkdir(parents=True, exist_ok=True)
    given = one.environment(**env)
    del given["PATH"]
    words = [f"--output={one.out.parent}/job.out", *flags, REPO / "eval" / f"{one.benchmark}_eval.sh"]
    return cluster.submit(*words, env=given, cwd=one.out.parent)


def log(one: Evaluation) -> str:
    path = one.out.parent / "job.out"
    return path.read_text() if path.exists() else ""


def nothing_left(one: Evaluation) -> None:
    mark = f"FAKE_LOG={one.env['FAKE_LOG']}"
    wait_until(lambda: processes_with(mark) == [], f"left: {processes_with(mark)}", 20)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_job_completes(cluster, tmp_path, local_data, tiny_model, benchmark):
    """A real model behind `transformers serve`. LiveCodeBench generates and does not grade."""
    env = {"MODEL_PATH": tiny_model, "DATASET_LOCAL": local_data / benchmark, "FAKE_LOG": tmp_path / "none"}
    one = Evaluation(benchmark, tmp_path / "it's out", env)
    job = cluster.end(submit(cluster, one, **SHORT))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log(one)
    assert "stopping the server" in log(one)
    if benchmark != "livecodebenchv5":
        summary = one.summary()
        assert (summary["questions"], summary["samples"]) == (len(samples.TRUTH[benchmark]), 2)
        assert summary["problems"] == [] and 0 < summary["tokens"]["mean"] <= 16
    nothing_left(one)


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"FAKE_BEHAVIOUR": "garbage"}, "error: evalscope failed with status"),
        ({"FAKE_BEHAVIOUR": "dies", "EVAL_BATCH": 1}, "error: the server died while evalscope ran: out of memory"),
        ({"FAKE_DIES": 1}, "error: the server ended before it was ready: CUDA error: no device"),
    ],
)
def test_a_job_fails(cluster, own, env, line):  # noqa: F811
    job = cluster.end(submit(cluster, own, **env))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), log(own)
    assert line in log(own)
    nothing_left(own)


def running(cluster: slurm.Slurm, one: Evaluation, *flags: object, **env: object) -> int:
    """A job whose client has asked something, and which would take 20 s more, with GENERATED_NUM=8."""
    job = submit(cluster, one, *flags, FAKE_BEHAVIOUR="slow", EVAL_BATCH=1, **env)
    seen = Path(one.env["FAKE_LOG"])
    wait_until(lambda: seen.exists() and len(seen.read_text().splitlines()) > 3, log(one))
    return job


def test_scancel(cluster, own):  # noqa: F811
    job = running(cluster, own)
    cluster.run("scancel", job)
    assert cluster.end(job)["JobState"] == "CANCELLED"
    wait_until(lambda: "stopped by signal 15" in log(own), log(own), 20)
    nothing_left(own)


def test_the_time_limit(cluster, own):  # noqa: F811
    """#SBATCH --signal=B:TERM@120 says so two minutes before; here 40 s before the end of two minutes.

    Slurm may signal up to 60 s earlier than that, which leaves 20 s to get going.
    """
    job = running(cluster, own, "--time=2", "--signal=B:TERM@40", GENERATED_NUM=40)
    found = cluster.end(job)
    assert (found["JobState"], found["ExitCode"]) in (("FAILED", "143:0"), ("TIMEOUT", "0:15")), log(own)
    assert "stopped by signal 15; run the same command again to continue" in log(own)
    nothing_left(own)


def test_requeue_goes_on(cluster, own):  # noqa: F811
    """The second run of the job asks only for what is missing."""
    job = running(cluster, own)
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", log(own))
    cluster.wait(job, ("PENDING",))
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    deadline = time.monotonic() + 240
    while cluster.job(job)["JobState"] != "COMPLETED":
        assert time.monotonic() < deadline and cluster.job(job)["JobState"] != "FAILED", log(own)
        time.sleep(1)
    assert own.summary()["samples"] == 8 and own.summary()["problems"] == []
    asked = [line for line in Path(own.env["FAKE_LOG"]).read_text().splitlines() if '"max_tokens": 1}' not in line]
    assert len(asked) <= 26
    nothing_left(own)


def test_what_the_job_asks_for(cluster, own):  # noqa: F811
    """The script's own lines, and that options of sbatch override them."""
    job = submit(cluster, own, "--hold")
    found = cluster.job(job)
    assert found["JobName"] == "aime24" and found["TimeLimit"] == "1-00:00:00" and found["Requeue"] == "1"
    assert "gres/gpu=1" in found["TRES"] or found.get("TresPerNode", "").endswith("gpu:1")
    other = submit(cluster, own, "--hold", "--gres=gpu:4", "--time=60", "--job-name=mine")
    found = cluster.job(other)
    assert found["JobName"] == "mine" and found["TimeLimit"] == "01:00:00"
    cluster.run("scancel", job, other)
