"""What every script promises: strict mode, no Python, little repetition, recipes that are numbers."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.conftest import REPO

SCRIPTS = sorted(path for folder in ("scripts", "eval", "docker") for path in (REPO / folder).rglob("*.sh"))
RECIPES = [path for path in SCRIPTS if path.name.startswith("InfiR2_")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_a_script_is_one_or_is_sourced(path):
    """A program has strict mode and a comment that says what it is; a part of one says so to shellcheck."""
    lines = path.read_text().splitlines()
    if lines[0].startswith("# shellcheck shell=bash"):
        assert lines[1].startswith("# ") and "set -euo pipefail" not in lines and not path.name.startswith("InfiR2_")
    else:
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
        comments = [line for line in lines[1:] if line.startswith("# ")]
        assert re.match(r"# [A-Z0-9].*[.:]", comments[0])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_lines_fit(path):
    """Messages and commands that cannot be broken may be longer."""
    text = path.read_text()
    long = [line for line in text.splitlines() if len(line) > 120 and not re.search(r"die |missing |[\"']|\$", line)]
    assert long == [] and "\t" not in text and not re.search(r"[ \t]$", text, re.MULTILINE) and text.endswith("\n")


def test_four_recipes_are_under_120_lines():
    big = [REPO / "scripts" / "CPT" / f"InfiR2_CPT_FP8_{name}.sh" for name in ("7B", "7B_decay", "1.5B", "1.5B_decay")]
    assert sum(len(path.read_text().splitlines()) for path in big) < 120


ASSIGNMENT = r'[A-Z_]+=(\$\{[A-Z_]+:?-[^}]*\}|[^\s$"]*)'
DEFAULT = r'"\$\{[A-Z_]+:?=[^}]*\}"'
NUMBERS = re.compile(rf"(({ASSIGNMENT})\s*)+(#.*)?|: ({DEFAULT}\s*)+(#.*)?")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_numbers(path):
    """No command, no condition: its numbers, and the file that makes something of them."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    last = re.fullmatch(r'source "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/(\S+)\.sh"', lines[-1])
    assert re.fullmatch(r"recipe|published|InfiR2_\w+(\.\d\w+)?", last[1])
    assert [line for line in lines[1:-1] if not NUMBERS.fullmatch(line)] == []
    assert len(path.read_text().splitlines()) <= 20


# What the language itself repeats.
SYNTAX = {"", "set -euo pipefail", *"{ } ( ) ) EOF TEXT done else esac fi shift exit return ;;".split()}


def test_duplicate_lines_are_below_ten_percent():
    lines = [
        line.strip()
        for path in SCRIPTS
        if path.is_relative_to(REPO / "scripts")
        for line in path.read_text().splitlines()
        if line.strip() not in SYNTAX and not line.strip().startswith("#")
    ]
    repeated = sum(count - 1 for count in Counter(lines).values())
    assert repeated / len(lines) < 0.10, Counter(lines).most_common(20)
