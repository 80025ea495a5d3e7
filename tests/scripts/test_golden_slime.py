"""The exact command of every SFT and RL recipe, engine and state, and what differs from the original recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.scripts.launch import (
    FINE_TUNING,
    GOLDEN,
    ORIGINALS,
    check_golden,
    command,
    difference_table,
    found_differences,
    golden,
    lines,
    named_differences,
    original_command,
    program_arguments,
    tracker,
)
from training.contract import check

DIFFERENCES = json.loads((GOLDEN / "differences_slime.json").read_text())
RELEASED = [script for script in FINE_TUNING if script in ORIGINALS]


def states(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, OUT_DIR) of every way that a recipe starts."""
    (folder / "fresh").mkdir()
    yield "fresh", folder / "fresh"
    root = tracker(folder / "resumed" / "checkpoints", 9)
    (root / "rollout").mkdir()
    (root / "rollout" / "global_dataset_state_dict_9.pt").touch()
    yield "resumed", folder / "resumed"


def variants(script: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(name, flags, environment) beside the recipe as it is."""
    yield "fp8", [], {}
    yield "the other scale format", [], {"FP8_SCALE_FORMAT": "fp32" if "SFT" in script else "pow2"}
    yield "bf16", [], {"PRECISION": "bf16"}
    yield "profile, no W&B", [], {"PROFILE": "1", "WANDB_PROJECT": ""}
    if "tiny" not in script:
        for nodes in (1, 2, 4):
            yield f"{nodes} nodes", ["--nnodes", str(nodes)], {"MASTER_ADDR": "10.0.0.1", "NCCL_SOCKET_IFNAME": "bond0"}
    if "RL" in script:
        yield "a KL term, no evaluation", [], {"KL_LOSS_COEF": "0.001", "EVAL_DATA": ""}


def named_commands(script: str, engine: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, words) of every variant of a fresh run, and of the recipe as it is resumed."""
    for state, out in states(folder):
        for name, flags, env in variants(script):
            if state == "fresh" or name == "fp8":
                yield f"{state}, {name}", command(script, *flags, "--engine", engine, out=out, **env)


@pytest.mark.parametrize("engine", ["megatron", "embedded"])
@pytest.mark.parametrize("script", FINE_TUNING)
def test_golden_command(script, engine, tmp_path):
    check_golden(f"{script}.{engine}.txt", golden(named_commands(script, engine, tmp_path)))


@pytest.mark.parametrize("script", FINE_TUNING)
def test_every_flag_is_in_the_contract_and_does_something(script, tmp_path):
    for _, out in states(tmp_path):
        for _, flags, env in variants(script):
            argv = program_arguments(command(script, *flags, "--engine", "megatron", out=out, **env))
            argv = [word.replace("/out", str(out)) for word in argv]  # the contract reads the tracker there
            profiler = {"--use-pytorch-profiler", "--record-memory-history"} if "PROFILE" in env else set()
            problems = check.problems_of("slime", argv, strict=True)
            assert {p.flag for p in problems} == profiler and all(p.level == "warning" for p in problems), problems


@pytest.mark.parametrize("name", RELEASED)
def test_only_named_differences_from_the_original(name, tmp_path):
    _, out = next(states(tmp_path))
    found = found_differences("slime", original_command(name), command(name, out=out))
    assert found == named_differences(DIFFERENCES, name)


def runtime_env(words: list[str]) -> dict[str, str]:
    """The environment of the job."""
    flag = next(n for n, word in enumerate(words) if word.startswith("--runtime-env-json"))
    text = words[flag].partition("=")[2] or words[flag + 1]
    return json.loads(text)["env_vars"]


# Of the original's runtime environment: why each entry that ours lacks is gone.
DROPPED = {
    "HOME": "moved the caches of every library to /root/slime",
    "http_proxy": "blanked; now passed on where it is set",
    "https_proxy": "blanked; now passed on where it is set",
    "NO_PROXY": "hosts of one cluster",
    "no_proxy": "hosts of one cluster; now passed on where it is set",
    "NCCL_SOCKET_IFNAME": "the interface of one cluster; now passed on where it is set",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": "changes the log only",
    "WANDB_MODE": "--wandb-mode says it",
    "WANDB_DIR": "--wandb-dir says it",
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_environment_of_the_job_is_the_originals(name, tmp_path):
    _, out = next(states(tmp_path))
    theirs, ours = runtime_env(original_command(name)), runtime_env(command(name, out=out))
    for key, value in theirs.items():
        if key != "PYTHONPATH":
            assert ours.get(key) == (None if key in DROPPED else value), key
    assert ours["PYTHONPATH"] == "/repo/training/Megatron-LM:/repo/training/slime"
    assert set(ours) - set(theirs) == {"WANDB_CONSOLE", "PYTHONUNBUFFERED"} | (
        {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES"} if "SFT" in name else set()
    )


@pytest.mark.parametrize("script", FINE_TUNING)
def test_bf16_drops_exactly_the_fp8_flags(script, tmp_path):
    _, out = next(states(tmp_path))
    fp8, bf16 = (program_arguments(command(script, out=out, PRECISION=precision)) for precision in ("fp8", "bf16"))
    gone = [line for line in lines(fp8) if line not in lines(bf16) and "FP8_" not in line]
    assert gone == ["--fp8-format e4m3", "--fp8-recipe blockwise", "--fp8-param-gather"]
    assert all("BF16_" in line for line in lines(bf16) if line not in lines(fp8))


def test_every_difference_says_why():
    for entry in DIFFERENCES:
        assert entry["why"] and entry["evidence"], entry["flag"]


@pytest.mark.parametrize("kind", ["SFT", "RL"])
def test_the_documentation_shows_the_list(kind):
    page = (REPO / "docs" / f"{kind}.md").read_text()
    table = page.partition("<!-- differences:begin -->\n")[2].partition("<!-- differences:end -->")[0]
    assert table == difference_table(of(kind)), "run: python -m tests.scripts.test_golden_slime"


def of(kind: str) -> list[dict]:
    """The differences of one folder's recipes."""
    return [entry for entry in DIFFERENCES if any(f"_{kind}_" in name for name in entry.get("scripts", RELEASED))]


if __name__ == "__main__":
    for folder in ("SFT", "RL"):
        print(folder, difference_table(of(folder)), sep="\n")
