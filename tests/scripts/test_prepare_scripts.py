"""scripts/SFT/prepare_data.sh and scripts/RL/prepare_data.sh."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from tests.conftest import REPO, ok, run
from tests.tools.data.samples import chat, jsonl, question, user
from tools.data.rows import Source

SCRIPTS = {"SFT": "infialign", "RL": "dapo-math"}
DAPO = {"prompt": [user("q")], "reward_model": {"ground_truth": "1"}}


def prepare(stage: str, *words: object, **more) -> subprocess.CompletedProcess:
    return run("bash", REPO / "scripts" / stage / "prepare_data.sh", *words, **more)


def error(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.rstrip("\n")


@pytest.fixture(params=SCRIPTS)
def stage(request) -> str:
    return request.param


def test_help(stage, tmp_path):
    for words in (["--help"], ["--input", "x", "-h"]):
        result = ok(prepare(stage, *words, cwd=tmp_path))
        assert result.stdout.startswith(f"usage: bash scripts/{stage}/prepare_data.sh ") and result.stderr == ""
        assert SCRIPTS[stage] in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing_and_can_be_pasted(stage, tmp_path):
    words = ["--input", "in $HOME 'x'.jsonl", "in 2.parquet", "--output", 'o "y".jsonl', "--drop-invalid", "--dry-run"]
    result = ok(prepare(stage, *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert result.stderr.splitlines() == [f"warning: --input: {name} not found" for name in (words[1], words[2])]
    command = shlex.split(result.stdout.replace("\\\n", ""))
    assert command[1:] == [
        str(REPO / "tools" / "prepare_data.py"), *words[:-1], "--format", SCRIPTS[stage]
    ]  # fmt: skip
    result = ok(prepare(stage, *words, "--format=messages", cwd=tmp_path))
    assert shlex.split(result.stdout.replace("\\\n", ""))[-1] == "--format=messages"


def test_for_real(stage, tmp_path):
    source = jsonl(tmp_path / "it's in.jsonl", [chat(0)] if stage == "SFT" else [DAPO, DAPO])
    for words, says in ((("--input", source), "written"), ((f"--input={source}",), "nothing to do")):
        result = ok(prepare(stage, *words, "--output", "a b/out.jsonl", cwd=tmp_path))
        lines = result.stdout.splitlines()
        assert lines[0].startswith(f"a b/out.jsonl: {says}")
        assert shlex.split(lines[-1]) == [f"DATA_DIR={tmp_path}/a b/out.jsonl"]
    rows = [row for _, row in Source(tmp_path / "a b" / "out.jsonl")]
    assert rows == ([chat(0)] if stage == "SFT" else [{"prompt": [user("q")], "label": "1"}])


def test_flags_reach_the_tool(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": 7}])
    keys = ("--format", "prompt-label", "--prompt-key", "question", "--label-key", "answer")
    ok(prepare("RL", "--input", source, "--output", tmp_path / "out.parquet", *keys))
    assert [row for _, row in Source(tmp_path / "out.parquet")] == [{"prompt": [user("q")], "label": "7"}]


def test_errors_are_one_line(stage, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [question(0)])
    for words, says in (
        ([], "error: --input: expected a file, found nothing"),
        (["--output", "x.jsonl", "--input"], "error: --input: expected a file, found nothing"),
        (["--input", source], "error: --output: expected a .jsonl or .parquet file, found ''"),
        (
            ["--input", source, "--output", "--drop-invalid"],
            "error: --output: expected a .jsonl or .parquet file, found",
        ),
        (["--input", "b.jsonl", "--output", "x.jsonl"], "error: --input: b.jsonl not found"),
        (["--input", source, "--output", "x.txt"], "prepare_data.py: error: --output x.txt: expected a name"),
        (
            ["--input", source, "--output", "x.jsonl", "--bogus"],
            "prepare_data.py: error: unrecognized arguments: --bogus",
        ),
        (["--input", source, "--output", "x.jsonl"], f"prepare_data.py: error: {source}:1: "),
    ):
        assert error(prepare(stage, *words, cwd=tmp_path)).startswith(says)
        assert list(tmp_path.iterdir()) == [source]
