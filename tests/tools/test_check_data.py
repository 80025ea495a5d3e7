"""check_data: what it prints, and one line for everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, ok, run
from tests.tools.data.samples import assistant, chat, jsonl, question, user, write

TOOL = REPO / "tools" / "check_data.py"


def check(*words: object, **more) -> subprocess.CompletedProcess:
    return run(sys.executable, TOOL, *words, **more)


def error(result: subprocess.CompletedProcess, status: int = 1) -> str:
    """The one line on stderr of a check that failed."""
    assert result.returncode == status and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("check_data.py: error: ")
    return result.stderr.removeprefix("check_data.py: error: ").rstrip("\n")


@pytest.fixture
def sft(tmp_path) -> Path:
    return jsonl(tmp_path / "it's sft.jsonl", [chat(index) for index in range(20)])


@pytest.fixture
def rl(tmp_path) -> Path:
    return jsonl(tmp_path / "it's rl.jsonl", [question(index) for index in range(20)])


def test_report(tiny_data, sft, tmp_path):
    plan = "--rollout-batch-size 6 --global-batch-size 3 --num-epoch 5 --save-interval 4".split()
    words = ("--kind", "sft", "--data", sft, "--tokenizer", tiny_data / "tokenizer", "--max-tokens", 100, *plan)
    report = json.loads(ok(check(*words, "--json")).stdout)
    assert report["samples"] == 20 and 0 < report["trained"] < report["tokens"] == round(20 * report["mean"])
    assert report["file"] == str(sft) and report["kind"] == "sft" and report["warnings"] == []
    assert (report["samples_per_epoch"], report["rollouts_per_epoch"], report["rollouts"]) == (18, 3, 15)
    assert (report["epochs"], report["optimizer_steps"]) == (4.5, 30)
    result = ok(check(*words))
    assert result.stderr == "" and result.stdout.splitlines() == [
        "samples: 20",
        f"tokens: {report['tokens']:,}, mean {report['mean']:,.1f}, longest {report['longest']} in line "
        f"{report['longest_at']}",
        f"trained tokens: {report['trained']:,}, {report['trained'] / report['tokens']:.1%}",
        "samples per epoch: 18 in 3 rollouts of 6",
        "rollouts: 15, 4.5 times through the file",
        "optimizer steps: 30 of 3 samples",
    ]
    assert ok(check("--kind", "sft", "--data", sft, *plan, "--rollouts")).stdout == "15 3\n"


def test_report_of_rl(rl):
    plan = "--rollout-batch-size 4 --n-samples-per-prompt 8 --global-batch-size 32 --num-rollout 100 --save-interval 20"
    words = ("--kind", "rl", "--data", rl, "--apply-chat-template", *plan.split())
    assert ok(check(*words)).stdout.splitlines() == [
        "samples: 20",
        "samples per epoch: 20 in 5 rollouts of 4",
        "rollouts: 100, 20 times through the file",
        "optimizer steps: 100 of 32 samples",
    ]
    assert ok(check(*words, "--num-epoch", 3, "--rollouts")).stdout == "100 5\n"
    # Held-out prompts may be fewer than a batch.
    assert ok(check(*words, "--rollout-batch-size", 64, "--eval")).stdout == "samples: 20\n"


def test_jsonl_and_parquet_are_the_same(tiny_data, tmp_path):
    rows = [{"messages": [user(f"q{index}"), assistant("word " * index + "end")]} for index in range(300)]
    reports = []
    for name in ("a b.jsonl", "a b.parquet"):
        path = write(tmp_path / name, rows)
        report = json.loads(
            ok(check("--kind", "sft", "--data", path, "--tokenizer", tiny_data / "tokenizer", "--json")).stdout
        )
        del report["file"], report["unit"]
        reports.append(report)
    assert reports[0] == reports[1] and reports[0]["longest_at"] == 300


def test_the_cache_saves_the_second_reading(tiny_data, sft, tmp_path):
    words = (
        "--kind",
        "sft",
        "--data",
        sft,
        "--tokenizer",
        tiny_data / "tokenizer",
        "--cache",
        tmp_path / "k" / "c.json",
    )
    first = ok(check(*words))
    kept = json.loads((tmp_path / "k" / "c.json").read_text())
    kept["counts"]["tokens"] += 1  # seen only if it is read
    (tmp_path / "k" / "c.json").write_text(json.dumps(kept))
    assert ok(check(*words)).stdout != first.stdout
    jsonl(sft, [chat(index) for index in range(21)])
    assert "samples: 21\n" in ok(check(*words)).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-tokens", "100"], "--max-tokens: expected --tokenizer with it"),
        (["--max-prompt-tokens", "100"], "--max-prompt-tokens: expected --max-tokens with --kind sft"),
        (["--apply-chat-template"], "--apply-chat-template: slime's SFT formats messages itself; expected it with"),
        (["--eval"], "--eval: slime evaluates prompts; expected it with --kind rl only"),
        (["--rollouts"], "--rollouts: expected --rollout-batch-size with it, and no --eval"),
        (["--rollouts", "--rollout-batch-size", "2"], "--rollouts: expected --num-epoch or --num-rollout with it"),
        (["--num-epoch", "0"], "argument --num-epoch: expected a positive integer, found '0'; see --help"),
        (["--num-epoc", "1"], "unrecognized arguments: --num-epoc 1; see --help"),
        (["--kind", "dpo"], "argument --kind: invalid choice: 'dpo'"),
        (["--tokenizer", "no where"], "no where: expected the directory of a Hugging Face tokenizer, found none"),
        (["--data", "no where.jsonl"], "no where.jsonl: No such file or directory"),
        (["--data", "."], ".: expected a .jsonl or .parquet file, found a directory"),
        (["--rollout-batch-size", "21"], "{sft}: expected at least --rollout-batch-size 21 samples, found 20"),
        (["--rollout-batch-size", "4", "--global-batch-size", "3"], "--global-batch-size 3: expected a divisor of"),
        (["--rollout-batch-size", "4", "--save-interval", "1"], "--save-interval 1: expected at least 2"),
        ("--rollout-batch-size 20 --num-epoch 2 --save-interval 9".split(), "{sft}: expected at least 2 rollouts per"),
        (
            "--rollout-batch-size 4 --num-rollout 9 --save-interval 2".split(),
            "--save-interval 2: expected a divisor of",
        ),
        (["--input-key", "prompt"], "{sft}:1: prompt: expected a list of messages, found nothing (and 19 more lines)"),
    ],
)
def test_one_line_for_everything_that_is_wrong(sft, tmp_path, words, says):
    result = check("--kind", "sft", "--data", sft, *words, cwd=tmp_path)
    assert error(result).startswith(says.format(sft=sft))


def test_rl_and_its_flags(rl):
    assert error(check("--kind", "rl", "--data", rl)).startswith(
        f"{rl}:1: prompt: expected text, found a list: messages"
    )
    result = check("--kind", "rl", "--data", rl, "--max-tokens", 9)
    assert error(result) == "--max-tokens: expected --max-prompt-tokens with --kind rl"
    result = check("--kind", "rl", "--data", rl, "--apply-chat-template", "--rm-type", "dapo")
    assert error(result).startswith(f"{rl}:1: label: --rm-type dapo needs texts")
    jsonl(rl, [question(0), question(1, "0")])
    result = ok(check("--kind", "rl", "--data", rl, "--apply-chat-template", "--rm-type", "math"))
    assert result.stderr.startswith(f"check_data.py: warning: {rl}:2: label: --rm-type math never rewards the label 0")
    assert result.stderr.count("\n") == 1 and result.stdout == "samples: 2\n"


def test_long_samples(tiny_data, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [chat(0), {"messages": [user("q"), assistant("word " * 200)]}])
    words = ("--kind", "sft", "--data", path, "--tokenizer", tiny_data / "tokenizer", "--max-tokens", 100)
    assert error(check(*words)).startswith(f"{path}:2: expected at most 100 tokens (--max-tokens), found ")
    result = ok(check(*words, "--allow-long"))
    assert result.stderr.startswith(f"check_data.py: warning: {path}:2: expected at most 100 tokens")


def test_help_needs_no_packages(tmp_path):
    """The check itself, without lengths and .parquet, needs none of the large packages either."""
    path = jsonl(tmp_path / "a.jsonl", [chat(0)])
    for name in ("transformers", "pyarrow", "numpy", "torch", "tokenizers"):
        (tmp_path / "hidden" / name).mkdir(parents=True)
        (tmp_path / "hidden" / name / "__init__.py").write_text("raise ImportError")
    hidden = {"PYTHONPATH": str(tmp_path / "hidden")}
    assert "--rollout-batch-size" in ok(check("--help", env=hidden)).stdout
    assert ok(check("--kind", "sft", "--data", path, env=hidden)).stdout == "samples: 1\n"
    result = check("--kind", "sft", "--data", path, "--tokenizer", tmp_path, env=hidden)
    assert error(result) == "counting tokens needs the package transformers"
    result = check("--kind", "sft", "--data", write(tmp_path / "a.parquet", [chat(0)]), env=hidden)
    assert error(result) == f"{tmp_path / 'a.parquet'}: reading .parquet needs the package pyarrow"
