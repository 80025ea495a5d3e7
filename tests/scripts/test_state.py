"""Where a launch starts: every state of the tracker files, decided before the engine runs."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import ok
from tests.scripts.launch import command, dry_run, program_arguments, tracker

FULL, DECAY = "InfiR2_CPT_FP8_7B", "InfiR2_CPT_FP8_7B_decay"
START_FLAGS = (
    "--load",
    "--save",
    "--pretrained-checkpoint",
    "--ckpt-step",
    "--override-opt_param-scheduler",
    "--finetune",
)


def state(script: str, *flags: object, out, **env: str) -> str:
    """The `state` line of the header."""
    header = ok(dry_run(script, *flags, out=out, **env)).stderr
    return next(line.split(None, 1)[1] for line in header.splitlines() if line.strip().startswith("state "))


def start(script: str, *flags: object, out, **env: str) -> dict[str, str]:
    """The flags that decide the start, with their values."""
    argv = program_arguments(command(script, *flags, out=out, **env))
    found = {}
    for name, value in zip(argv, [*argv[1:], "--"], strict=True):
        if name in START_FLAGS:
            found[name] = "" if value.startswith("--") else value
    return found


def error(script: str, *flags: object, out, **env: str) -> str:
    """What a failing launch says: one line for each thing that is wrong."""
    result = dry_run(script, *flags, out=out, **env)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.returncode != 0 and result.stdout == "" and lines, result
    assert all(line.startswith("error: ") for line in lines), result
    return "\n".join(lines)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "a run"


@pytest.fixture
def save(out):
    return out / "checkpoints"


@pytest.fixture
def stable(tmp_path):
    return tracker(tmp_path / "stable" / "checkpoints", 36000, 35000)


# ---------------------------------------------------------------- full run


def test_fresh_from_converted_weights(out, tmp_path):
    init = tracker(tmp_path / "init", "release")
    assert state(FULL, out=out, INIT_CHECKPOINT=str(init)) == f"fresh (weights of {init}, release)"
    assert start(FULL, out=out, INIT_CHECKPOINT=str(init)) == {
        "--save": "/out/checkpoints",
        "--load": "/out/checkpoints",
        "--pretrained-checkpoint": str(init),
    }


@pytest.mark.parametrize("form", ["{root}", "{root}/", "{root}/iter_0000007", "{run}"])
def test_init_may_be_a_root_a_run_or_a_step(out, tmp_path, form):
    root = tracker(tmp_path / "other" / "checkpoints", 9, 7)
    init = form.format(root=root, run=root.parent)
    expected = {"--save": "/out/checkpoints", "--load": "/out/checkpoints", "--pretrained-checkpoint": str(root)}
    if "iter_" in form:
        expected["--ckpt-step"] = "7"
    assert start(FULL, out=out, INIT_CHECKPOINT=init) == expected


def test_no_init_is_an_error_unless_from_scratch(out):
    assert "--from-scratch" in error(FULL, out=out, INIT_CHECKPOINT="")
    assert state(FULL, "--from-scratch", out=out, INIT_CHECKPOINT="") == "fresh (random weights)"
    assert "--pretrained-checkpoint" not in start(FULL, "--from-scratch", out=out)


def test_init_that_is_not_there_warns_in_a_dry_run_only(out):
    result = ok(dry_run(FULL, out=out))
    assert (
        "warning: INIT_CHECKPOINT: expected /models/qwen_torch_dist/latest_checkpointed_iteration.txt" in result.stderr
    )


def test_resume_forgets_how_it_started(out, save):
    tracker(save, 3000, 2000)
    for flags in ([], ["--from-scratch"], ["--load", save], ["--load", out], ["--load", save / "iter_0003000"]):
        assert state(FULL, *flags, out=out) == "resume from 3000"
        assert start(FULL, *flags, out=out) == {"--save": "/out/checkpoints", "--load": "/out/checkpoints"}


def test_going_back_is_refused_with_the_way_to_do_it(out, save):
    tracker(save, 3000, 2000)
    message = error(FULL, "--load", save / "iter_0002000", out=out)
    assert "this run is at 3000" in message and "write 2000 into" in message


def test_continue_another_run_with_its_optimizer(out, stable):
    for path, step in ((stable, 36000), (stable.parent, 36000), (stable / "iter_0035000", 35000)):
        assert start(FULL, "--load", path, out=out)["--ckpt-step"] == str(step)
        assert state(FULL, "--load", path, out=out) == f"continue {stable} from {step}, with its optimizer"


def test_finished_does_nothing(out, save):
    tracker(save, 40000)
    result = ok(dry_run(FULL, out=out))
    assert "finished at 40000" in result.stderr and "nothing to do" in result.stderr and result.stdout == ""
    assert state(FULL, "--train-iters", 50000, out=out) == "resume from 40000"


@pytest.mark.parametrize("text", ["", "abc", "0", "-3", "12 13", "1e3", "9" * 12])
def test_broken_tracker(out, save, text):
    tracker(save, 10)
    (save / "latest_checkpointed_iteration.txt").write_text(text)
    assert f"{save}/latest_checkpointed_iteration.txt: expected an iteration > 0" in error(FULL, out=out)


def test_missing_step(out, save):
    tracker(save, 3000)
    shutil.rmtree(save / "iter_0003000")
    assert f"{save}/iter_0003000: checkpoint directory not found" in error(FULL, out=out)


def test_a_converted_checkpoint_in_the_save_directory(out, save):
    tracker(save, "release")
    assert "holds a converted checkpoint" in error(FULL, out=out)


def test_a_tracker_may_end_in_a_newline_or_have_zeros(out, save):
    tracker(save, 3000)
    (save / "latest_checkpointed_iteration.txt").write_text("0003000\n")
    assert state(FULL, out=out) == "resume from 3000"


# ---------------------------------------------------------------- decay


def test_decay_fresh(out, stable):
    flags = start(DECAY, "--load", stable / "iter_0035000", out=out)
    assert flags == {
        "--save": "/out/checkpoints",
        "--load": str(stable),
        "--ckpt-step": "35000",
        "--override-opt_param-scheduler": "",
    }
    argv = program_arguments(command(DECAY, "--load", stable / "iter_0035000", out=out))
    for flag, value in (("--train-iters", "40000"), ("--lr-warmup-iters", "0"), ("--lr-wsd-decay-iters", "5000")):
        assert argv[argv.index(flag) + 1] == value
    argv = program_arguments(command(DECAY, "--load", stable, out=out))
    assert argv[argv.index("--train-iters") + 1] == "41000"


def test_decay_resume(out, save):
    tracker(save, 36000)
    (save / "decay_start.txt").write_text("35000 /gone/checkpoints\n")
    for flags in ([], ["--load", "/gone/checkpoints/iter_0035000"]):
        assert state(DECAY, *flags, out=out) == "resume from 36000"
        assert start(DECAY, *flags, out=out) == {
            "--save": "/out/checkpoints",
            "--load": "/out/checkpoints",
            "--override-opt_param-scheduler": "",
        }


def test_decay_that_was_cut_off_before_its_first_checkpoint_starts_again(out, save, stable):
    save.mkdir(parents=True)
    (save / "decay_start.txt").write_text(f"35000 {stable}\n")
    assert state(DECAY, out=out) == f"decay of {stable} from 35000"


def test_decay_finished(out, save):
    tracker(save, 40000)
    (save / "decay_start.txt").write_text("35000 /gone/checkpoints\n")
    assert "nothing to do" in ok(dry_run(DECAY, out=out)).stderr


def test_decay_needs_a_start(out):
    assert "--load: expected the stable-phase checkpoint" in error(DECAY, out=out)


def test_decay_from_a_second_place_needs_another_directory(out, save, stable):
    tracker(save, 36000)
    (save / "decay_start.txt").write_text(f"35000 {stable}\n")
    assert "set another OUT_DIR" in error(DECAY, "--load", stable / "iter_0036000", out=out)


def test_decay_does_not_write_into_the_stable_run(stable):
    assert "must not write where it starts" in error(DECAY, "--load", stable, out=stable.parent)
    assert "belongs to a decay run" in error(FULL, out=_decayed(stable))


def _decayed(stable):
    (stable / "decay_start.txt").write_text("35000 /elsewhere\n")
    return stable.parent


def test_a_damaged_decay_record(out, save):
    save.mkdir(parents=True)
    (save / "decay_start.txt").write_text("abc\n")
    assert "decay_start.txt: expected '<iteration> <checkpoint root>'" in error(DECAY, out=out)


@pytest.mark.parametrize("flag", ["--ckpt-step", "--finetune", "--no-load-optim", "--pretrained-checkpoint"])
def test_the_launcher_decides_the_start(out, flag):
    assert f"{flag}: the launcher decides how a run starts" in error(FULL, flag, "5", out=out)
