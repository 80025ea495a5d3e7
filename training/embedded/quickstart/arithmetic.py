#!/usr/bin/env python3
"""Make the task that the quickstart fine-tunes on: additions with worked steps, an exact answer and a real split.

    python training/embedded/quickstart/arithmetic.py --output-dir arithmetic --seed 1

    pretrain.jsonl      {"text"}: worked sums, in varied wording and as dialogues, for pre-training beside the corpus
    sft_stage1.jsonl    {"messages"}: question, worked steps, boxed answer; 1 and 2 digits
    sft_stage2.jsonl    the same with 2 digits, and a share of wrong answers after right steps
    rl.jsonl            {"prompt", "label"}: every question once
    validation.jsonl    {"prompt", "label"}: what RL evaluates on as it runs
    held_out.jsonl      {"prompt", "label"}: what the report measures
    benchmark/test.jsonl  {"problem", "answer"}: the first held-out questions as evalscope reads AIME

Validation and held-out questions are in none of the other files, in neither order.

The wrong answers are what real fine-tuning data has, made on purpose: they leave a model that knows the answer and
samples another one half of the time, which is what reinforcement learning with verifiable rewards can repair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTION = "What is {}?"
WORDINGS = (  # of varied length, so that a model learns to look for the numbers and not so many tokens back
    QUESTION,
    "Add {}.",
    "How much is {}?",
    "Find {} and say how.",
    "Work out {} column by column.",
    "Someone asks for {}, and we start from the right.",
    "Here is a sum, {}. What does it come to?",
    "To add numbers such as {}, write one below the other and take the last digits first.",
)
# Beside them the markup of a conversation, without the boxed answer. From the wordings alone a model of this size
# learns to add, but not to find the second digits of a question that stands at another distance than those it has read.
DIALOGUE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>{}</think> {}.<|im_end|>"
DIALOGUES = 0.5  # their share
SPLITS = (("held_out", 0.10), ("validation", 0.15), ("train", 1.0))  # upper ends of their shares of all pairs
Row = dict[str, Any]
Pair = tuple[int, int]


def split_of(a: int, b: int) -> str:
    """The split of a pair: by hash, the same for a + b and b + a."""
    low, high = sorted((a, b))
    digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(name for name, end in SPLITS if place <= end)


def question(a: int, b: int) -> str:
    """What the user asks."""
    return QUESTION.format(f"{a}+{b}")


def steps(a: int, b: int) -> str:
    """The addition column by column from the right, each with the carry that it received: "5+8+0=13 3+4+1=8".

    Two digits each, the carry and what stays, but for the last: the result begins with what comes out there.
    """
    columns, carry, places = [], 0, max(len(str(a)), len(str(b)))
    for place in range(places):
        x, y = a // 10**place % 10, b // 10**place % 10
        width = 1 if place == places - 1 else 2
        columns.append(f"{x}+{y}+{carry}={x + y + carry:0{width}}")
        carry = (x + y + carry) // 10
    return " ".join(columns)


def worked(a: int, b: int) -> str:
    """The sum and its steps, the same in pre-training and in what the assistant says, so that one carries over."""
    return f" {a}+{b}: {steps(a, b)}"


def answer(a: int, b: int, result: int) -> str:
    """What the assistant says: the worked sum as a thought, then the boxed result."""
    return f"<think>{worked(a, b)}</think>\\boxed{{{result}}}"


def pairs(rng: random.Random, digits: tuple[int, ...], split: str = "train") -> Iterator[Pair]:
    """Endless pairs of one split; each time a number of digits is drawn for both."""
    while True:
        size = rng.choice(digits)
        a, b = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
        if split_of(a, b) == split:
            yield a, b


def unique(source: Iterator[Pair], count: int) -> list[Pair]:
    """The first `count` that differ, order within a pair not counting."""
    found: dict[Pair, Pair] = {}
    for a, b in source:
        found.setdefault((min(a, b), max(a, b)), (a, b))
        if len(found) == count:
            return list(found.values())
    raise AssertionError("pairs() is endless")


def conversation(a: int, b: int, result: int) -> Row:
    """A row of SFT data."""
    return {
        "messages": [
            {"role": "user", "content": question(a, b)},
            {"role": "assistant", "content": answer(a, b, result)},
        ]
    }


def problem(a: int, b: int) -> Row:
    """A row of RL and test data."""
    return {"prompt": [{"role": "user", "content": question(a, b)}], "label": str(a + b)}


def wrong(rng: random.Random, result: int) -> int:
    """A result that is off by one in one of its last two digits."""
    return result + rng.choice((-10, -1, 1, 10))


def build(options: argparse.Namespace) -> dict[str, list[Row]]:
    """Every file, by name. A file's rows depend on the seed and its own size only."""
    names = ("pretrain", "wording", "stage1", "stage2", "rl", "validation", "held_out")
    rng = {name: random.Random(f"{options.seed} {name}") for name in names}

    def take(name: str, digits: tuple[int, ...], count: int) -> list[Pair]:
        source = pairs(rng[name], digits)
        return [next(source) for _ in range(count)]

    def text(a: int, b: int) -> Row:
        if rng["wording"].random() < DIALOGUES:
            return {"text": DIALOGUE.format(question(a, b), worked(a, b), a + b)}
        wording = rng["wording"].choice(WORDINGS).format(f"{a}+{b}")
        return {"text": f"{wording}{worked(a, b)}, so {a + b}."}

    def problems(name: str, split: str, count: int) -> list[Row]:
        return [problem(a, b) for a, b in unique(pairs(rng[name], (2,), split), count)]

    def stage2(a: int, b: int) -> Row:
        chance = rng["stage2"]
        return conversation(a, b, wrong(chance, a + b) if chance.random() < options.wrong else a + b)

    held_out = problems("held_out", "held_out", options.held_out)
    return {
        "pretrain": [text(a, b) for a, b in take("pretrain", (1, 2, 2), options.pretrain)],
        "sft_stage1": [conversation(a, b, a + b) for a, b in take("stage1", (1, 2, 2), options.stage1)],
        "sft_stage2": [stage2(a, b) for a, b in take("stage2", (2,), options.stage2)],
        "rl": problems("rl", "train", options.rl),
        "validation": problems("validation", "validation", options.validation),
        "held_out": held_out,
        "benchmark/test": [
            {"problem": row["prompt"][0]["content"], "answer": row["label"]} for row in held_out[: options.benchmark]
        ],
    }


def main() -> int:
    """Write the directory whole, or not at all. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="directory to make")
    parser.add_argument("--seed", type=int, default=1, help="of all rows (default: %(default)s)")
    sizes = {"pretrain": 15000, "stage1": 800, "stage2": 800, "rl": 3200, "validation": 64}
    sizes |= {"held-out": 200, "benchmark": 32}
    for name, count in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="rows (default: %(default)s)")
    parser.add_argument(
        "--wrong", type=float, default=0.5, help="share of wrong answers in stage 2 (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.output_dir.exists():
        print(
            f"error: --output-dir: expected a path that does not exist yet, found {options.output_dir}", file=sys.stderr
        )
        return 1
    partial = options.output_dir.with_name(f".{options.output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, rows in build(options).items():
        file = partial / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows):,} rows")
    os.replace(partial, options.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
