"""prepare_data: a file that check_data accepts, or one line and nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPO, ok, run
from tests.tools.data.samples import chat, jsonl, question, user, write
from tools.data.rows import Source

TOOL = REPO / "tools" / "prepare_data.py"


def prepare(*words: object, **more) -> subprocess.CompletedProcess:
    return run(sys.executable, TOOL, *words, **more)


def error(result: subprocess.CompletedProcess, status: int = 1) -> str:
    assert result.returncode == status and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("prepare_data.py: error: ")
    return result.stderr.removeprefix("prepare_data.py: error: ").rstrip("\n")


def sharegpt(index: int) -> dict:
    question, answer = chat(index)["messages"]
    return {
        "conversations": [{"from": "human", "value": question["content"]}, {"from": "gpt", "value": answer["content"]}]
    }


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_sft_from_files_to_a_checked_file(tmp_path, suffix):
    inputs = [
        write(tmp_path / "in 1.parquet", [sharegpt(index) for index in range(5)]),
        jsonl(tmp_path / "in 2.jsonl", [chat(index) for index in range(5, 8)]),
    ]
    output = tmp_path / "made here" / f"it's out.{suffix}"
    words = ("--format", "infialign", "--input", *inputs, "--output", output)
    assert ok(prepare(*words)).stdout == f"{output}: written\nrows: 8 read, 8 written\n"
    found = [[message["content"] for message in row["messages"]] for _, row in Source(output)]
    assert found == [[message["content"] for message in chat(index)["messages"]] for index in range(8)]
    ok(run(sys.executable, REPO / "tools" / "check_data.py", "--kind", "sft", "--data", output))
    before = output.stat()
    assert ok(prepare(*words)).stdout.startswith(f"{output}: nothing to do, it holds these rows already\n")
    assert output.stat() == before and list(output.parent.iterdir()) == [output]
    result = prepare("--format", "infialign", "--input", inputs[1], "--output", output)
    assert error(result) == f"{output}: exists and holds something else; remove it, or choose another --output"
    assert output.stat() == before


def test_dapo_to_a_checked_file(tmp_path):
    text = "End with Answer: $Answer (without quotes) where $Answer is the answer to the problem."
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [user(f"{text} {index % 3}")],
            "reward_model": {"ground_truth": str(index % 3)},
        }
        for index in range(9)
    ]
    output = tmp_path / "dapo.jsonl"
    result = ok(prepare("--format", "dapo-math", "--input", write(tmp_path / "in.parquet", rows), "--output", output))
    assert result.stdout.splitlines() == [
        f"{output}: written",
        "rows: 9 read, 3 written",
        "repeated questions left out: 6",
        r'instruction made "Answer: \boxed{$Answer}": 3, left as it was: 0',
        "keys left out: data_source",
    ]
    assert all("\\boxed{$Answer} where" in row["prompt"][0]["content"] for _, row in Source(output))
    words = ("--kind", "rl", "--data", output, "--apply-chat-template", "--rollout-batch-size", 3)
    assert (
        "samples per epoch: 3 in 1 rollouts of 3"
        in ok(run(sys.executable, REPO / "tools" / "check_data.py", *words)).stdout
    )


def test_invalid_rows(tmp_path):
    rows = [
        sharegpt(0),
        {"conversations": [{"from": "human", "value": "q"}]},
        {"conversations": [{"from": "tool", "value": ""}]},
    ]
    path = jsonl(tmp_path / "a.jsonl", [*rows, rows[1]])
    words = ("--format", "sharegpt", "--input", path, "--output", tmp_path / "out.jsonl")
    says = "messages[0].role: expected assistant in the last message, found 'user'; --drop-invalid leaves it out"
    assert error(prepare(*words)) == f"{path}:2: {says}" and not (tmp_path / "out.jsonl").exists()
    assert ok(prepare(*words, "--drop-invalid")).stdout.splitlines()[1:] == [
        "rows: 4 read, 1 written",
        "dropped: 1: conversations[].from: expected one of human, user, gpt, assistant, system",
        "dropped: 2: messages[].role: expected assistant in the last message",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "out.json"], "--output out.json: expected a name that ends in .jsonl or .parquet"),
        (["--output", "in.jsonl"], "--output in.jsonl: expected another file than --input"),
        (["--output", "o.jsonl", "--input", "no where.jsonl"], "no where.jsonl: No such file or directory"),
        (["--output", "o.jsonl", "--input", "."], ".: expected a .jsonl or .parquet or .json file, found a directory"),
        (
            ["--output", "o.jsonl", "--input", "a.csv"],
            "a.csv: expected a file whose name ends in .jsonl or .parquet or",
        ),
        (["--output", "in.jsonl/o.jsonl"], "in.jsonl: File exists"),
        (["--output", "o.jsonl", "--format", "csv"], "argument --format: invalid choice: 'csv'"),
        (
            ["--output", "o.jsonl", "--format", "dapo-math"],
            "in.jsonl:1: reward_model: expected an object with ground_tr",
        ),
        ([], "the following arguments are required: --output; see --help"),
    ],
)
def test_one_line_and_nothing_for_everything_that_is_wrong(tmp_path, words, says):
    jsonl(tmp_path / "in.jsonl", [question(0)])
    (tmp_path / "a.csv").write_text("a")
    before = sorted(tmp_path.rglob("*"))
    result = prepare("--format", "prompt-label", "--input", "in.jsonl", *words, cwd=tmp_path)
    assert error(result).startswith(says) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_run_again(tmp_path, number):
    path, output = jsonl(tmp_path / "a.jsonl", (sharegpt(index) for index in range(60_000))), tmp_path / "out.jsonl"
    words = [sys.executable, str(TOOL), "--format", "sharegpt", "--input", str(path), "--output", str(output)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".out.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert not output.exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and stderr == "prepare_data.py: error: interrupted\n"
        assert list(tmp_path.iterdir()) == [path]
    ok(prepare(*words[2:]))
    assert sum(1 for _ in output.open()) == 60_000 and not partial.exists()
    assert json.loads(output.open().readline()) == chat(0)
