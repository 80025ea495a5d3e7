"""The exact command of every CPT recipe, engine, state and precision, and what differs from the original recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.scripts.launch import (
    FINE_TUNING,
    GOLDEN,
    ORIGINALS,
    SCRIPTS,
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

DIFFERENCES = json.loads((GOLDEN / "differences.json").read_text())


def states(script: str, folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(name, OUT_DIR, flags) of every way that the script starts."""
    (folder / "fresh").mkdir()
    if script.endswith("_decay"):
        iteration = "200" if "tiny" in script else "35000"
        yield "decay fresh", folder / "fresh", ["--load", f"/stable/checkpoints/iter_{int(iteration):07d}"]
        out = folder / "resumed"
        tracker(out / "checkpoints", int(iteration) + 10)
        (out / "checkpoints" / "decay_start.txt").write_text(f"{iteration} /stable/checkpoints\n")
        yield "decay resumed", out, []
    else:
        yield "fresh", folder / "fresh", []
        yield "from scratch", folder / "fresh", ["--from-scratch"]
        out = folder / "resumed"
        tracker(out / "checkpoints", 100)
        yield "resumed", out, []


def named_commands(script: str, engine: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, words) of every state and precision."""
    for name, out, flags in states(script, folder):
        for precision, scales in (("fp8", "pow2"), ("fp8", "fp32"), ("bf16", "pow2")):
            env = {"PRECISION": precision, "FP8_SCALE_FORMAT": scales}
            title = f"{name}, {precision}, {scales}" if precision == "fp8" else f"{name}, {precision}"
            yield title, command(script, *flags, "--engine", engine, out=out, **env)


@pytest.mark.parametrize("engine", ["megatron", "embedded"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_golden_command(script, engine, tmp_path):
    check_golden(f"{script}.{engine}.txt", golden(named_commands(script, engine, tmp_path)))


def test_every_golden_file_is_that_of_a_recipe():
    wanted = {f"{script}.{engine}.txt" for script in (*SCRIPTS, *FINE_TUNING) for engine in ("megatron", "embedded")}
    found = {path.name for path in GOLDEN.glob("*.txt")}
    assert found <= wanted and (found == wanted or os.environ.get("UPDATE_GOLDEN") == "1")  # being written


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_contract_and_does_something(script, tmp_path):
    for _, out, flags in states(script, tmp_path):
        for env in ({}, {"PRECISION": "bf16"}, {"PROFILE": "1"}, {"WANDB_PROJECT": ""}):
            argv = program_arguments(command(script, *flags, "--engine", "megatron", out=out, **env))
            problems = check.problems_of("pretrain_gpt", argv, world_size=1 if "tiny" in script else 8, strict=True)
            allowed = [p for p in problems if p.level == "warning"]
            assert [str(p) for p in problems if p not in allowed] == []
            assert [p.flag for p in allowed] in ([], ["--load"])  # a start from another run's checkpoint


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_drops_exactly_the_fp8_flags(script, tmp_path):
    _, out, flags = next(states(script, tmp_path))
    fp8, bf16 = (lines(command(script, *flags, out=out, PRECISION=precision)) for precision in ("fp8", "bf16"))
    gone = [line for line in fp8 if line not in bf16]
    new = [line for line in bf16 if line not in fp8]
    names = (
        "--fp8-format e4m3",
        "--fp8-recipe blockwise",
        "--fp8-param-gather",
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0",
    )
    kept = [line for line in gone if not line.startswith(names) and "FP8_" not in line]
    assert kept == [] and all("BF16" in line for line in new)


# ---------------------------------------------------------------- against the original


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name in ORIGINALS])
def test_only_named_differences_from_the_original(name, tmp_path):
    _, out, flags = next(states(name, tmp_path))
    found = found_differences("pretrain_gpt", original_command(name), command(name, *flags, out=out))
    assert found == named_differences(DIFFERENCES, name)


def test_every_difference_says_why():
    for entry in DIFFERENCES:
        assert entry["why"] and entry["evidence"], entry["flag"]


def test_the_documentation_shows_the_list():
    page = (REPO / "docs" / "CPT.md").read_text()
    table = page.partition("<!-- differences:begin -->\n")[2].partition("<!-- differences:end -->")[0]
    assert table == difference_table(DIFFERENCES), "run: python -m tests.scripts.test_golden"


if __name__ == "__main__":
    print(difference_table(DIFFERENCES), end="")
