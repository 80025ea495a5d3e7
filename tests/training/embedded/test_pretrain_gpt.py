"""The embedded engine through its launchers: exact resume, schedule, decay, signals, and what others make of it."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.conftest import REPO, ok, run
from tests.tools.checkpoint.test_torch_dist import hf_model, mcore_logits
from tools.checkpoint import torch_dist

TINY = REPO / "scripts" / "CPT" / "InfiR2_CPT_FP8_tiny.sh"
DECAY = REPO / "scripts" / "CPT" / "InfiR2_CPT_FP8_tiny_decay.sh"
ITERATIONS, WARMUP, DECAY_ITERATIONS, PEAK, FLOOR = 12, 3, 4, 1e-3, 1e-4
SHORT = [
    *("--lr-warmup-iters", WARMUP, "--lr-wsd-decay-iters", DECAY_ITERATIONS),
    *("--micro-batch-size", 2, "--global-batch-size", 4, "--save-interval", 2, "--eval-interval", 4, "--eval-iters", 1),
]
FULL = ["--from-scratch", "--train-iters", ITERATIONS, *SHORT]


def environment(data: Path, out: Path, precision: str = "fp8", **more: str) -> dict[str, str]:
    """What a recipe reads from its environment."""
    return {
        "OUT_DIR": str(out),
        "DATA_PATH": str(data / "text_text_document"),
        "TOKENIZER_MODEL": str(data / "tokenizer"),
        "PRECISION": precision,
        **more,
    }


def train(data: Path, out: Path, *flags: object, script: Path = TINY, precision: str = "fp8"):
    return run("bash", script, *flags, env=environment(data, out, precision))


def interrupt(data: Path, out: Path, *flags: object, after: int, script: Path = TINY, precision="fp8", how="SIGKILL"):
    """Start a run and end it once the log shows iteration `after`: SIGKILL to all its processes, or to its launcher."""
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment(data, out, precision)}
    words = ["bash", str(script), *map(str, flags)]
    process = subprocess.Popen(
        words, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = out / "logs" / "train_node0.log"
    marker = f"iteration {after:8d}/"
    deadline = time.monotonic() + 120
    while not (log.exists() and marker in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    if how == "SIGKILL":
        kill_session(process.pid)
    else:
        process.send_signal(getattr(signal, how))
    output, _ = process.communicate()
    return process.returncode, output


def kill_session(session: int) -> None:
    """SIGKILL to every process of a session, whatever process group it has moved to."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(") ", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            os.kill(int(stat.parent.name), signal.SIGKILL)


def scalars(out: Path, ignored: tuple[str, ...] = ("throughput", "tokens-per-second")) -> dict[str, dict[int, float]]:
    """TensorBoard scalars by tag and step; a step that was logged twice must have been logged equal. ignored: how the
    names of times begin.
    """
    found: dict[str, dict[int, set[float]]] = {}
    for file in (out / "tensorboard").iterdir():
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in (tag for tag in events.Tags()["scalars"] if not tag.startswith(ignored)):
            for event in events.Scalars(tag):
                found.setdefault(tag, {}).setdefault(event.step, set()).add(event.value)
    # As in Megatron, a run that ends at an --eval-interval evaluates twice there, on consecutive samples.
    twice = found.get("lm loss validation", {})
    twice.update({step: {sum(values)} for step, values in twice.items()})
    assert all(len(values) == 1 for steps in found.values() for values in steps.values()), found
    return {tag: {step: value for step, (value,) in steps.items()} for tag, steps in found.items()}


def state(out: Path, iteration: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, weights and optimizer, and the random state."""
    directory = out / "checkpoints" / f"iter_{iteration:07d}"
    with torch_dist.Reader(directory) as reader:
        tensors = {key: reader.read(key).tobytes() for key in reader.tensors}
        rng = reader.read_object("rng_state/shard_0.0_1.1")["torch_rng_state"].numpy().tobytes()
        args = reader.common()["args"]
    position = f"{args.consumed_train_samples} {args.consumed_valid_samples}".encode()
    return {**tensors, "rng": rng, "position": position}


def wsd(iteration: int, decay_from: int, warmup: int = WARMUP) -> float:
    """Learning rate after `iteration` steps: linear warm-up, plateau, cosine decay over DECAY_ITERATIONS."""
    if iteration <= warmup:
        return PEAK * iteration / warmup
    if iteration <= decay_from:
        return PEAK
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * (iteration - decay_from) / DECAY_ITERATIONS)) / 2


def assert_schedule(found: dict[int, float], decay_from: int, first: int = 1, last: int = ITERATIONS) -> None:
    assert sorted(found) == list(range(first, last + 1))
    for iteration, rate in found.items():
        assert rate == pytest.approx(wsd(iteration, decay_from), rel=1e-6), iteration


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def uninterrupted(request, tiny_data, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "a run"
    ok(train(tiny_data, out, *FULL, precision=request.param))
    return request.param, out


@pytest.fixture(scope="module")
def fp8_run(tiny_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stable") / "run"
    ok(train(tiny_data, out, *FULL))
    return out


def test_it_learns_and_follows_the_schedule(uninterrupted):
    _, out = uninterrupted
    found = scalars(out)
    assert_schedule(found["learning-rate"], decay_from=ITERATIONS - DECAY_ITERATIONS)
    assert sorted(found["lm loss test"]) == [0, ITERATIONS]
    assert found["lm loss test"][ITERATIONS] < 0.95 * found["lm loss test"][0]


def test_killed_and_resumed_is_bit_for_bit_the_same(uninterrupted, tiny_data, tmp_path):
    precision, reference = uninterrupted
    for after in (3, 9):  # between checkpoints, and again after a resume
        code, _ = interrupt(tiny_data, tmp_path, *FULL, after=after, precision=precision)
        assert code == -signal.SIGKILL
    result = ok(train(tiny_data, tmp_path, *FULL, precision=precision))
    assert "resume from 8" in result.stderr
    assert state(tmp_path, ITERATIONS) == state(reference, ITERATIONS)
    assert scalars(tmp_path) == scalars(reference)


def test_a_kill_between_checkpoint_and_tracker_is_repaired(fp8_run, tiny_data, tmp_path):
    ok(train(tiny_data, tmp_path, *FULL))
    torch_dist.write_tracker(tmp_path / "checkpoints", 10)
    ok(train(tiny_data, tmp_path, *FULL))
    assert state(tmp_path, ITERATIONS) == state(fp8_run, ITERATIONS)


def test_a_finished_run_does_nothing(fp8_run, tiny_data):
    before = sorted((path, path.stat().st_mtime_ns) for path in fp8_run.rglob("*"))
    result = ok(train(tiny_data, fp8_run, *FULL))
    assert "finished at 12" in result.stderr and "nothing to do" in result.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in fp8_run.rglob("*")) == before


def test_decay_from_the_end_of_the_plateau_is_the_full_run(fp8_run, tiny_data, tmp_path):
    """The standalone decay and the decay of the full recipe are the same steps."""
    start = fp8_run / "checkpoints" / "iter_0000008"
    ok(train(tiny_data, tmp_path, "--load", start, *SHORT, "--lr-warmup-iters", 0, script=DECAY))
    assert_schedule(scalars(tmp_path)["learning-rate"], decay_from=8, first=9)
    assert state(tmp_path, ITERATIONS) == state(fp8_run, ITERATIONS)


def test_decay_crashes_and_resumes(fp8_run, tiny_data, tmp_path):
    start = ["--load", fp8_run / "checkpoints" / "iter_0000006", *SHORT, "--lr-warmup-iters", 0]
    ok(train(tiny_data, tmp_path / "whole", *start, script=DECAY))
    interrupt(tiny_data, tmp_path / "killed", *start, after=9, script=DECAY)
    result = ok(train(tiny_data, tmp_path / "killed", *start, script=DECAY))
    assert "resume from 8" in result.stderr
    assert_schedule(scalars(tmp_path / "killed")["learning-rate"], decay_from=6, first=7, last=10)
    assert state(tmp_path / "killed", 10) == state(tmp_path / "whole", 10)
    assert scalars(tmp_path / "killed") == scalars(tmp_path / "whole")
    again = ok(train(tiny_data, tmp_path / "killed", *start, script=DECAY))
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize(("how", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_stops(fp8_run, tiny_data, tmp_path, how, status):
    code, output = interrupt(tiny_data, tmp_path, *FULL, after=5, how=how)
    assert code == status, output
    reached = torch_dist.read_tracker(tmp_path / "checkpoints")
    assert 5 <= reached < ITERATIONS and f"saved at iteration {reached}" in output
    assert "run the same command again" in output
    ok(train(tiny_data, tmp_path, *FULL))
    assert state(tmp_path, ITERATIONS) == state(fp8_run, ITERATIONS)


def test_a_time_slice_ends_with_status_75(tiny_data, tmp_path):
    result = train(tiny_data, tmp_path, *FULL, "--exit-interval", 5)
    assert result.returncode == 75 and "saved at iteration 5 of 12" in result.stderr


def test_a_second_launch_waits_for_the_first(tiny_data, tmp_path):
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment(tiny_data, tmp_path)}
    words = ["bash", str(TINY), *map(str, FULL)]
    first, second = (
        subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)
    )
    told = [first.communicate()[1], second.communicate()[1]]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sum("waiting for it to end" in text for text in told) == 1
    assert sum("nothing to do" in text for text in told) == 1
    assert scalars(tmp_path)["lm loss"].keys() == set(range(1, ITERATIONS + 1))


def test_megatron_core_reads_the_checkpoint(uninterrupted, tmp_path):
    _, out = uninterrupted
    ids = np.random.default_rng(0).integers(0, 2048, (2, 40))
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    directory = out / "checkpoints" / f"iter_{ITERATIONS:07d}"
    theirs = mcore_logits(directory, tmp_path / "ids.npz", tmp_path / "logits.npy")
    with torch.no_grad():
        ours = hf_model(out / "checkpoints")(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours - theirs).max() < 2e-5 < np.abs(theirs).max()


def test_fp8_differs_from_bf16_and_says_so(fp8_run, tiny_data, tmp_path):
    ok(train(tiny_data, tmp_path, *FULL, precision="bf16"))
    fp8, bf16 = scalars(fp8_run)["lm loss"], scalars(tmp_path)["lm loss"]
    assert all(fp8[step] != bf16[step] for step in bf16)
    assert fp8[ITERATIONS] == pytest.approx(bf16[ITERATIONS], rel=0.02)
    log = (fp8_run / "logs" / "train_node0.log").read_text()
    assert "FP8 rounding: 28 of 29 linear layers in E4M3 blocks with power-of-two scales" in log


def test_float32_scales_follow_the_variable(fp8_run, tiny_data, tmp_path):
    flags = ["--from-scratch", *SHORT, "--train-iters", 6, "--exit-interval", 1]
    env = environment(tiny_data, tmp_path, FP8_SCALE_FORMAT="fp32")
    assert run("bash", TINY, *flags, env=env).returncode == 75
    assert "with float32 scales" in (tmp_path / "logs" / "train_node0.log").read_text()
    assert scalars(tmp_path)["lm loss"][1] != scalars(fp8_run)["lm loss"][1]


def test_log_lines_are_megatrons(fp8_run):
    lines = [line for line in (fp8_run / "logs" / "train_node0.log").read_text().splitlines() if "lm loss:" in line]
    assert len(lines) == ITERATIONS
    fields = [field.partition(":")[0].strip() for field in lines[-1].split(" | ")]
    assert "iteration       12/      12" in lines[-1]
    assert fields[1:3] == ["consumed samples", "elapsed time per iteration (ms)"]
    for name in (
        "learning rate",
        "global batch size",
        "lm loss",
        "loss scale",
        "grad norm",
        "num zeros",
        "params norm",
    ):
        assert name in fields


def test_a_terminal_shows_a_bar_and_the_log_stays_clean(tiny_data, tmp_path):
    import pty

    primary, secondary = pty.openpty()
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment(tiny_data, tmp_path)}
    process = subprocess.Popen(["bash", str(TINY), *map(str, FULL)], env=env, stderr=secondary, stdout=secondary)
    os.close(secondary)
    shown = b""
    while True:
        try:
            piece = os.read(primary, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        shown += piece
    assert process.wait() == 0
    assert b"tokens/s" in shown and b"12/12" in shown and b"validation loss" in shown
    assert b"consumed samples" not in shown
    log = (tmp_path / "logs" / "train_node0.log").read_text()
    assert "tokens/s" not in log and "\r" not in log and log.count("consumed samples") == ITERATIONS


# ---------------------------------------------------------------- starting points and errors


def test_it_starts_from_weights_of_another_run(fp8_run, tiny_data, tmp_path):
    """INIT_CHECKPOINT gives weights only: a fresh optimizer and schedule, the data from the start."""
    env = environment(tiny_data, tmp_path, INIT_CHECKPOINT=str(fp8_run / "checkpoints"))
    result = ok(run("bash", TINY, "--train-iters", 5, *SHORT, env=env))
    assert f"weights of {fp8_run}/checkpoints, 12" in result.stderr
    found = scalars(tmp_path)
    assert found["learning-rate"][1] == pytest.approx(PEAK / WARMUP)
    held_out = scalars(fp8_run)["lm loss test"][ITERATIONS]
    assert found["lm loss test"][0] == held_out


def test_a_blend_of_two_corpora(tiny_data, tmp_path):
    """megatron-core's blend asks for a rank; its indices are cached, and a second run reads them."""
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny_data / f"text_text_document{suffix}", tmp_path / f"a second one{suffix}")
    blend = ["--data-path", "0.5", tiny_data / "text_text_document", "0.5", tmp_path / "a second one"]
    flags = ["--from-scratch", *SHORT, "--train-iters", 6, *blend, "--data-cache-path", tmp_path / "cache"]
    ok(train(tiny_data, tmp_path / "one", *flags))
    cached = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "cache").iterdir())
    assert any("BlendedDataset" in name and name.endswith("dataset_index.npy") for name, _ in cached)
    (train_index,) = (tmp_path / "cache").glob("*BlendedDataset-train-dataset_index.npy")
    share = np.load(train_index).mean()
    assert 0.4 < share < 0.6
    ok(train(tiny_data, tmp_path / "two", *flags))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "cache").iterdir()) == cached
    assert state(tmp_path / "two", 6) == state(tmp_path / "one", 6)


def test_another_model_is_refused(fp8_run, tiny_data, tmp_path):
    result = train(
        tiny_data, tmp_path, "--load", fp8_run / "checkpoints", *SHORT, "--train-iters", 20, "--norm-epsilon", 1e-5
    )
    assert result.returncode != 0
    assert "--norm-epsilon" in result.stderr + result.stdout


def test_a_changed_schedule_is_refused(fp8_run, tiny_data, tmp_path):
    root = fp8_run / "checkpoints"
    result = train(tiny_data, tmp_path, "--load", root, *SHORT, "--train-iters", 20, "--lr", 2e-3)
    assert result.returncode != 0 and "--override-opt_param-scheduler" in result.stdout + result.stderr
    assert not (tmp_path / "checkpoints" / torch_dist.TRACKER).exists()


def test_a_diverged_run_stops_without_saving(tiny_data, tmp_path):
    flags = [*FULL, "--lr", "1e30", "--min-lr", "0", "--clip-grad", "0", "--lr-warmup-iters", "0"]
    result = train(tiny_data, tmp_path, *flags)
    assert result.returncode != 0 and "the loss is nan" in result.stdout + result.stderr
    assert torch_dist.read_tracker(tmp_path / "checkpoints") in (None, 2)


def test_data_of_another_tokenizer_is_refused(tiny_data, tmp_path):
    """Its token numbers exceed the embedding: without the check, an index error deep in torch."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>")), eos_token="<eos>"
    )
    words.save_pretrained(tmp_path / "words")
    env = environment(tiny_data, tmp_path / "run", TOKENIZER_MODEL=str(tmp_path / "words"))
    result = run("bash", TINY, *FULL, env=env)
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    assert "--tokenizer-model: the data has token" in result.stdout and "128 embedding rows" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-layer-freq", "2"], "--moe-layer-freq: the embedded engine does not do this"),
        (["--hidden-dropout", "0.1"], "--hidden-dropout: expected 0.0"),
        (["--optimizer", "sgd"], "--optimizer: the embedded engine trains only with --optimizer adam"),
        (["--fp8-recipe", "tensorwise"], "--fp8-recipe: the embedded engine emulates only blockwise"),
        (["--micro-batch-size", "3"], "--global-batch-size"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(tiny_data, tmp_path, flags, message):
    result = train(tiny_data, tmp_path / "run", *FULL, *flags)
    assert result.returncode != 0 and message in result.stdout + result.stderr
    assert not (tmp_path / "run" / "checkpoints" / torch_dist.TRACKER).exists()
