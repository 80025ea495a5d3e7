"""What every script promises: strict mode, help, little repetition, recipes that are numbers."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.conftest import REPO, ok, run

SCRIPTS = sorted((REPO / "scripts").rglob("*.sh"))
PROGRAMS = [path for path in SCRIPTS if path.read_text().startswith("#!") and path.parent.name != "lib"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_strict_and_helpful(path):
    assert "set -euo pipefail" in path.read_text()
    result = ok(run("bash", path, "--help"))
    assert len(result.stdout.splitlines()) >= 2 and result.stderr == ""


def test_four_recipes_are_under_120_lines():
    big = [REPO / "scripts" / "CPT" / f"InfiR2_CPT_FP8_{name}.sh" for name in ("7B", "7B_decay", "1.5B", "1.5B_decay")]
    assert sum(len(path.read_text().splitlines()) for path in big) < 120


# What the language itself repeats.
SYNTAX = {"", "set -euo pipefail", *"{ } ( ) ) EOF TEXT done else esac fi shift exit return ;;".split()}


def test_duplicate_lines_are_below_ten_percent():
    lines = [
        line.strip()
        for path in SCRIPTS
        for line in path.read_text().splitlines()
        if line.strip() not in SYNTAX and not line.strip().startswith("#")
    ]
    repeated = sum(count - 1 for count in Counter(lines).values())
    assert repeated / len(lines) < 0.10, Counter(lines).most_common(20)
