"""scripts/list.sh and --list: a line for each recipe, from the recipe."""

from __future__ import annotations

import pytest

from tests.conftest import REPO, ok, run
from tests.scripts.launch import FINE_TUNING, SCRIPTS, recipe

LIST = REPO / "scripts" / "list.sh"


def listed(*words: str, **env: str) -> list[list[str]]:
    """The rows, cut into columns."""
    heading, *rows = ok(run("bash", LIST, *words, env=env)).stdout.splitlines()
    assert heading.split() == ["recipe", "engine", "nodes", "x", "GPUs", "TP", "CP", "length"]
    return [[row[:46].strip(), *row[46:55].split(), row[56:70].strip(), *row[70:].split(None, 2)] for row in rows]


def test_every_recipe_is_listed_once():
    rows = {row[0]: row[1:] for row in listed()}
    assert list(rows) == [str(recipe(name).relative_to(REPO)) for name in (*SCRIPTS, *FINE_TUNING)]
    assert rows["scripts/CPT/InfiR2_CPT_FP8_7B.sh"] == [
        *("megatron", "1 x 8", "4", "1", "167.8B tokens in 40000 iterations"),
    ]
    assert rows["scripts/CPT/InfiR2_CPT_FP8_7B_decay.sh"][-1] == "21.0B tokens in 5000 iterations"
    assert rows["scripts/SFT/InfiR2_SFT_FP8_0.5B_stage2.sh"] == [
        *("megatron", "1 x 8", "1", "2", "epochs: 5, samples of a step: 64"),
    ]
    assert rows["scripts/RL/InfiR2_RL_FP8_7B_stage2_4node.sh"] == [
        *("megatron", "4 x 8", "4", "2", "10240 rollouts of 128 x 16 samples, up to 16384 tokens"),
    ]
    assert rows["scripts/RL/InfiR2_RL_FP8_tiny_stage1.sh"][:2] == ["embedded", "1 x 1"]


def test_words_and_variables_and_flags_choose():
    assert [row[0][-27:] for row in listed("RL", "0.5B")] == [f"InfiR2_RL_FP8_0.5B_stage{n}.sh"[-27:] for n in (1, 2)]
    assert {row[3] for row in listed("CPT", TP="1")} == {"1"}
    line = ok(run("bash", recipe("InfiR2_CPT_FP8_tiny"), "--list", "--train-iters", 1000, cwd=REPO / "docs")).stdout
    assert line.startswith("scripts/CPT/InfiR2_CPT_FP8_tiny.sh ") and line.endswith(" 1.0M tokens in 1000 iterations\n")


@pytest.mark.parametrize("words", [["x"], ["CPT", "RL"], ["--all"]])
def test_nothing_to_list(words):
    result = run("bash", LIST, *words)
    assert (result.returncode, result.stdout) == (1, "") and "no recipe has these words in its name" in result.stderr
