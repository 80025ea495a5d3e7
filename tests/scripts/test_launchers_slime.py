"""SFT and RL launches: what is checked before a job is submitted, and real jobs that are killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, ok, run
from tests.scripts.launch import FINE_TUNING, command, dry_run, recipe, tracker
from tools.checkpoint import torch_dist

SFT, RL = "InfiR2_SFT_FP8_tiny_stage1", "InfiR2_RL_FP8_tiny_stage1"


def variables(tiny_stages: Path, script: str, out: Path) -> dict[str, str]:
    """The environment of a launch."""
    rl = "_RL_" in script
    return {
        "OUT_DIR": str(out),
        "DATA_DIR": f"{tiny_stages / 'arithmetic'}/{'rl' if rl else 'sft_stage1'}.jsonl",
        "EVAL_DATA": f"{tiny_stages / 'arithmetic'}/validation.jsonl",
        "REF_LOAD": str(tiny_stages / "sft_stage2"),
        "HF_CHECKPOINT": str(tiny_stages / ("sft_stage2_fp8" if rl else "sft_stage2_hf")),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",  # other tests may run beside
        "WANDB_PROJECT": "",
    }


def refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """It failed with one line of error, which has the parts."""
    assert result.returncode == 1, result.stdout
    errors = [line for line in result.stderr.splitlines() if re.match(r"(\w+\.py: )?error: ", line)]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), result.stderr


# ---------------------------------------------------------------- without a job


@pytest.mark.parametrize("script", FINE_TUNING)
def test_help(script, tmp_path):
    result = ok(run("bash", recipe(script), "--help", cwd=tmp_path))
    assert result.stdout.startswith(f"usage: bash scripts/{script.split('_')[1]}/{script}.sh") and result.stderr == ""
    assert all(name in result.stdout for name in ("DATA_DIR", "HF_CHECKPOINT", "REF_LOAD", "OUT_DIR"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["megatron", "embedded"])
@pytest.mark.parametrize("script", [SFT, RL])
def test_dry_run_writes_nothing_and_can_be_pasted(script, engine, tmp_path):
    out = tmp_path / "out $HOME 'x' \"y\""
    result = ok(dry_run(script, "--engine", engine, out=out, DATA_DIR="/data/a b's.jsonl"))
    assert list(tmp_path.iterdir()) == []
    name = result.stdout.split()[0]
    pasted = subprocess.run(
        ["bash", "-c", f"ray() {{ printf '%s\\0' \"$@\"; }}\n{result.stdout.replace(name, 'ray', 1)}"],
        capture_output=True,
        text=True,
        check=True,
    )
    words = pasted.stdout.split("\0")
    assert "/data/a b's.jsonl" in words and f"{out}/checkpoints" in words
    assert json.loads(words[words.index("--metadata-json") + 1]) == {"infir2_out_dir": str(out)}
    env = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    assert env.get("TENSORBOARD_DIR") == (f"{out}/tensorboard" if engine == "embedded" else None)


@pytest.mark.parametrize("flag", ["--load", "--save", "--ref-load", "--start-rollout-id", "--finetune"])
def test_how_a_run_starts_is_the_launchers(flag, tmp_path):
    refused(dry_run(SFT, flag, "x", out=tmp_path / "out"), f"{flag}: the launcher decides how a run starts")


def test_tensorboard_is_for_the_embedded_engine(tmp_path):
    """Run for real, the pinned slime stops at its first metric: its adapter uses an instance that it never makes."""
    out = tmp_path / "out"
    assert "--use-tensorboard" in command(SFT, out=out)
    assert "--use-tensorboard" not in command(SFT, "--engine", "megatron", out=out)
    result = dry_run(SFT, "--engine", "megatron", "--use-tensorboard", out=out)
    refused(result, "--use-tensorboard: the pinned slime stops at its first metric with it")


@pytest.mark.parametrize(
    ("script", "flags", "env", "parts"),
    [
        (SFT, [], {"PRECISION": "fp4"}, ("PRECISION: expected one of fp8 bf16, found 'fp4'",)),
        (SFT, [], {"FP8_SCALE_FORMAT": "ue8m0"}, ("FP8_SCALE_FORMAT: expected one of pow2 fp32",)),
        (SFT, ["--nnodes", "0"], {}, ("NNODES: expected an integer > 0, found '0'",)),
        (SFT, [], {"NUM_EPOCH": "-1"}, ("NUM_EPOCH: expected an integer > 0",)),
        (SFT, ["--rdzv-endpoint", "x:1"], {}, ("--rdzv-endpoint: slime does not know this flag",)),
        (SFT, ["--save-interval", "1"], {}, ("--save-interval",)),
        (RL, ["--num-rollout", "25"], {}, ("--save-interval",)),
        (RL, [], {"RAY_ADDRESS": "ray://h:10001"}, ("RAY_ADDRESS: expected Ray's job server",)),
        ("InfiR2_SFT_FP8_7B_stage1", [], {"TP": "3"}, ("multiple of",)),
        ("InfiR2_RL_FP8_7B_stage1_4node", ["--global-batch-size", "100"], {}, ("100",)),
    ],
)
def test_what_is_wrong_on_any_machine_stops_a_dry_run(script, flags, env, parts, tmp_path):
    result = dry_run(script, *flags, out=tmp_path / "out", **env)
    assert result.returncode == 1 and all(part in result.stderr for part in parts), result.stderr
    assert "Traceback" not in result.stderr and result.stdout == "" and list(tmp_path.iterdir()) == []


def test_a_directory_of_data_must_hold_one_file(tiny_stages, tmp_path):
    (tmp_path / "data").mkdir()
    env = {"DATA_DIR": str(tmp_path / "data"), "PYTHON": sys.executable}
    refused(dry_run(SFT, out=tmp_path / "out", **env), "expected one .jsonl or .parquet file", "found 0")
    shutil.copy(f"{tiny_stages / 'arithmetic'}/sft_stage1.jsonl", tmp_path / "data" / "one.jsonl")
    assert f"--prompt-data {tmp_path}/data/one.jsonl" in ok(dry_run(SFT, out=tmp_path / "out", **env)).stdout
    shutil.copy(f"{tiny_stages / 'arithmetic'}/sft_stage1.jsonl", tmp_path / "data" / "two.jsonl")
    refused(dry_run(SFT, out=tmp_path / "out", **env), "found 2; name the file")


def test_a_sample_may_fill_all_gpus_of_a_context_parallel_group(tiny_stages, tmp_path):
    """slime/backends/megatron_utils/data.py:262: a micro batch holds --max-tokens-per-gpu on each of them."""
    env = variables(tiny_stages, SFT, tmp_path / "out") | {"GPUS_PER_NODE": "2"}
    too_long = run("bash", recipe(SFT), "--dry-run", "--max-tokens-per-gpu", 40, env=env)
    refused(too_long, "sft_stage1.jsonl:", "expected at most 40 tokens")
    ok(run("bash", recipe(SFT), "--dry-run", "--max-tokens-per-gpu", 40, env=env | {"CP": "2"}))
    ok(run("bash", recipe(SFT), "--dry-run", "--max-tokens-per-gpu", 40, "--context-parallel-size", 2, env=env))


def test_states(tiny_stages, tmp_path):
    out = tmp_path / "out"
    root = out / "checkpoints"

    def launch(**env: str) -> subprocess.CompletedProcess:
        places = variables(tiny_stages, SFT, out) | env
        return dry_run(SFT, "--num-epoch", 3, **{k: v for k, v in places.items() if k != "OUT_DIR"}, out=out)

    fresh = ok(launch())
    assert f"fresh (weights of {tiny_stages / 'sft_stage2'}/checkpoints, 1)" in fresh.stderr
    assert "3 epochs = 18 rollouts of 16 samples" in fresh.stderr
    words = shlex.split(fresh.stdout.replace("\\\n", ""))
    assert (
        "--start-rollout-id" not in words
        and words[words.index("--ref-load") + 1] == f"{tiny_stages / 'sft_stage2'}/checkpoints"
    )

    step = f"{tiny_stages / 'sft_stage2'}/checkpoints/iter_0000001"
    assert "--ref-ckpt-step 1" in ok(launch(REF_LOAD=step)).stdout
    refused(launch(REF_LOAD=str(root)), "is where this run writes")

    tracker(root, 4)
    refused(launch(), "global_dataset_state_dict_4.pt: not found, so the data would start over")
    (root / "rollout").mkdir()
    (root / "rollout" / "global_dataset_state_dict_4.pt").touch()
    resumed = ok(launch())
    assert "resume after rollout 4" in resumed.stderr and "--start-rollout-id 5" in resumed.stdout

    (root / "latest_checkpointed_iteration.txt").write_text("6")
    refused(launch(), "iter_0000006: checkpoint directory not found")
    for text in ("release", "abc", "0"):
        (root / "latest_checkpointed_iteration.txt").write_text(text)
        refused(launch(), "release" if text == "release" else f"found '{text}'")

    tracker(root, 17)
    (root / "rollout" / "global_dataset_state_dict_17.pt").touch()
    done = ok(launch())
    assert f"nothing to do: {root} has its 18 rollouts" in done.stderr and done.stdout == ""


def test_a_job_that_saves_meanwhile_is_seen(tiny_stages, tmp_path):
    """One that goes on without its launcher may save between any two steps of the next one."""
    out = tmp_path / "out"
    saved = tracker(tmp_path / "later", 2)
    (saved / "rollout").mkdir()
    (saved / "rollout" / "global_dataset_state_dict_2.pt").touch()
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case $1 in */contract/check.py) [ -d {out}/checkpoints ] || {{ mkdir {out}; mv {saved} {out}/checkpoints; }} ;; esac
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    env = variables(tiny_stages, SFT, out) | {"PYTHON": str(python), "RAY_ADDRESS": "http://127.0.0.1:9"}
    result = run("bash", recipe(SFT), *SHORT[SFT].split(), env=env)
    refused(result, "no Ray cluster answers at http://127.0.0.1:9")
    assert result.stderr.count("error: ") == 1 and "resume after rollout 2" in result.stderr
    assert "fresh" not in result.stderr


def test_missing_things_stop_a_launch(tiny_stages, tmp_path):
    env = variables(tiny_stages, SFT, tmp_path / "out")
    for name, part in (
        ("REF_LOAD", "REF_LOAD: expected"),
        ("DATA_DIR", "DATA_DIR: /nowhere"),
        ("HF_CHECKPOINT", "HF_CHECKPOINT: directory /nowhere not found"),
    ):
        value = "/nowhere.jsonl" if name == "DATA_DIR" else "/nowhere"
        refused(run("bash", recipe(SFT), env={**env, name: value}), part)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}\n')
    refused(run("bash", recipe(SFT), env={**env, "DATA_DIR": str(bad)}), "bad.jsonl:1", "content")
    rl = {**variables(tiny_stages, RL, tmp_path / "out"), "EVAL_DATA": "/nowhere.jsonl"}
    refused(run("bash", recipe(RL), env=rl), "EVAL_DATA: /nowhere.jsonl not found", "EVAL_DATA= for no evaluation")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_no_cluster_for_slime_is_one_line(tiny_stages, tmp_path):
    """The submodules are not there, either, in this checkout: a dry run names both."""
    env = variables(tiny_stages, "InfiR2_SFT_FP8_7B_stage1", tmp_path / "out")
    result = run("bash", recipe("InfiR2_SFT_FP8_7B_stage1"), env=env)
    assert result.returncode == 1 and "error: " in result.stderr and "Traceback" not in result.stderr


def test_the_scale_formats_of_trainer_and_rollout_checkpoint(tiny_stages, tmp_path):
    env = variables(tiny_stages, RL, tmp_path / "out")
    places = {k: v for k, v in env.items() if k != "OUT_DIR"}
    header = ok(dry_run(RL, out=tmp_path / "out", **places)).stderr
    assert "fp32 scales" in header and re.search(
        rf"{re.escape(str(tiny_stages / 'sft_stage2_fp8'))}: fp32$", header, re.MULTILINE
    )
    result = dry_run(RL, out=tmp_path / "out", **{**places, "HF_CHECKPOINT": str(tiny_stages / "pow2")})
    refused(result, "fp32", "pow2", "python tools/bf16_cast_fp8.py", "--force-pow-2-scale False")
    assert (
        "pow2 scales"
        in ok(
            dry_run(
                RL,
                out=tmp_path / "out",
                **{**places, "HF_CHECKPOINT": str(tiny_stages / "pow2"), "FP8_SCALE_FORMAT": "pow2"},
            )
        ).stderr
    )


# ---------------------------------------------------------------- real jobs


SHORT = {SFT: "--num-rollout 6 --save-interval 2", RL: "--num-rollout 4 --save-interval 2 --rollout-max-response-len 4"}
# A model of one step is never right: without dynamic sampling its groups are kept, and the run goes on.
RL_ENV = {"EVAL_DATA": "", "DYNAMIC_SAMPLING": "0"}


class Launch:
    """A launch in the background, its output in a file."""

    def __init__(self, script: str, env: dict[str, str], *flags: str) -> None:
        self.log = Path(env["OUT_DIR"]).with_suffix(".txt")
        clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root")} | env
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                ["bash", recipe(script), *SHORT[script].split(), *flags],
                env=clean,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def until(self, text: str, count: int = 1, seconds: float = 300) -> None:
        """Wait until the output has `text` so many times."""
        end = time.monotonic() + seconds
        while self.log.read_text().count(text) < count:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def end(self) -> tuple[int, str]:
        """Exit status and output."""
        return self.process.wait(300), self.log.read_text()


def finish(script: str, env: dict[str, str], *flags: str) -> str:
    """Launch, to the end."""
    status, text = Launch(script, env, *flags).end()
    assert status == 0, text
    return text


def weights(out: str, rollout: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    with torch_dist.Reader(Path(out) / "checkpoints" / f"iter_{rollout:07d}") as reader:
        return {key: reader.read(key).tobytes() for key in reader.tensors}


def processes(*needles: str) -> list[int]:
    """Processes whose command line has all of these."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(needle in text for needle in needles) and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """RAY_TEMP_DIR of a cluster that the first launch starts."""
    folder = tempfile.mkdtemp(dir="/tmp", prefix="l")
    yield folder
    run("bash", REPO / "scripts" / "ray_stop.sh", env={"RAY_TEMP_DIR": folder})
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def uninterrupted(tiny_stages, cluster, tmp_path_factory) -> dict[str, bytes]:
    """The weights of an SFT run that nothing interrupted."""
    env = variables(tiny_stages, SFT, tmp_path_factory.mktemp("whole") / "out it's") | {"RAY_TEMP_DIR": cluster}
    text = finish(SFT, env)
    assert "done: rollout 6 of 6" in text
    log = Path(env["OUT_DIR"], "logs", "train.log").read_text()
    assert "rollout 5: {" in log and "--prompt-data" in log  # the job's lines, and the command before them
    assert list(Path(env["OUT_DIR"], "tensorboard").iterdir())
    again = finish(SFT, env)
    assert "nothing to do" in again
    return weights(env["OUT_DIR"], 5)


def driver(out: str) -> int:
    """The process that trains."""
    (found,) = [pid for pid in processes("training/embedded/train.py", out) if _parent_is_a_shell(pid)]
    return found


def _parent_is_a_shell(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith((b"python", b"python3"))


def test_the_driver_is_killed(tiny_stages, cluster, uninterrupted, tmp_path):
    env = variables(tiny_stages, SFT, tmp_path / "out") | {"RAY_TEMP_DIR": cluster}
    launch = Launch(SFT, env)
    launch.until("saved checkpoint")
    os.kill(driver(env["OUT_DIR"]), signal.SIGKILL)
    status, text = launch.end()
    assert status == 1 and re.search(r"error: the trainer failed with status 1 \(saved at rollout [24] of 6\)", text), (
        text
    )
    assert "resume after rollout" in finish(SFT, env)
    assert weights(env["OUT_DIR"], 5) == uninterrupted


def test_the_launcher_is_killed_and_the_next_follows_its_job(tiny_stages, cluster, uninterrupted, tmp_path):
    env = variables(tiny_stages, SFT, tmp_path / "out") | {"RAY_TEMP_DIR": cluster}
    launch = Launch(SFT, env)
    launch.until("step 0")
    os.killpg(launch.process.pid, signal.SIGKILL)
    launch.process.wait()
    text = finish(SFT, env)
    assert "of this run is still there: following it" in text and "done: rollout 6 of 6" in text
    assert weights(env["OUT_DIR"], 5) == uninterrupted


def test_ctrl_c_stops_the_job(tiny_stages, cluster, uninterrupted, tmp_path):
    env = variables(tiny_stages, SFT, tmp_path / "out") | {"RAY_TEMP_DIR": cluster}
    launch = Launch(SFT, env)
    launch.until("saved checkpoint")
    os.kill(launch.process.pid, signal.SIGINT)
    status, text = launch.end()
    assert status == 130 and "run the same command again to continue" in text, text
    assert processes("training/embedded/train.py", env["OUT_DIR"]) == []
    finish(SFT, env)
    assert weights(env["OUT_DIR"], 5) == uninterrupted


def test_the_head_is_killed(tiny_stages, uninterrupted, tmp_path):
    """A cluster of the launcher's own this time: it starts another one."""
    env = variables(tiny_stages, SFT, tmp_path / "out")
    launch = Launch(SFT, env)
    launch.until("saved checkpoint")
    (folder,) = re.findall(r"starting Ray.* in (\S+)", launch.log.read_text())
    for pid in processes(f"{folder}/session_"):
        os.kill(pid, signal.SIGKILL)
    status, text = launch.end()
    assert status == 1 and "no longer answers" in text, text
    finish(SFT, env)
    assert weights(env["OUT_DIR"], 5) == uninterrupted
    assert processes(f"{folder}/session_") == []  # and stops it


def test_rl_and_its_actor_is_killed(tiny_stages, cluster, tmp_path):
    """The learning itself, killed and resumed: tests/training/embedded/test_train.py."""
    results = []
    for name, kill in (("whole", False), ("killed", True)):
        env = variables(tiny_stages, RL, tmp_path / name) | RL_ENV | {"RAY_TEMP_DIR": cluster}
        launch = Launch(RL, env)
        if kill:
            launch.until("saved checkpoint")
            for pid in processes("ray::RolloutManager"):
                os.kill(pid, signal.SIGKILL)
            status, text = launch.end()
            assert status == 1 and "error: the rollout actor died" in text, text
            finish(RL, env)
        else:
            status, text = launch.end()
            assert status == 0, text
        results.append(weights(env["OUT_DIR"], 3))
    assert results[0] == results[1]
