"""Small datasets of our own in the schemas that evalscope reads, for both of its releases."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path

import pyarrow
from pyarrow import parquet

MATH = [
    ("What is 17 * 19?", "323"),
    ("Let x + y = 40 and x - y = 6. Find x.", "23"),
    ("How many positive divisors does 360 have?", "24"),
]
GPQA = [
    ("Which particle mediates electromagnetism?", "photon", "gluon", "W boson", "graviton"),
    ("Which gas has atomic number 2?", "helium", "hydrogen", "neon", "argon"),
]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def case(text: str, output: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": text, "output": output, "testtype": kind}


def packed(cases: list[dict[str, str]]) -> str:
    """As LiveCodeBench keeps its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def problem(
    name: str, text: str, public: list, private: list, date: str, *, function: str = "", starter: str = ""
) -> dict:
    return {
        "question_title": name,
        "question_content": text,
        "platform": "leetcode" if function else "atcoder",
        "question_id": name,
        "contest_id": "c",
        "contest_date": date,
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(private),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


TWICE = "class Solution:\n    def double(self, x: int) -> int:\n        "
CODE = [
    problem(
        "sum",
        "Read two integers on one line and print their sum.",
        [case("1 2\n", "3\n")],
        [case("10 -3\n", "7\n")],
        "2024-09-01T00:00:00",
    ),
    problem(
        "double",
        "Return twice x.",
        [case("3", "6", "functional")],
        [case("-4", "-8", "functional")],
        "2025-01-15T00:00:00",
        function="double",
        starter=TWICE,
    ),
    problem("early", "Before the window.", [case("1\n", "1\n")], [case("2\n", "2\n")], "2024-07-31T00:00:00"),
    problem("edge", "Edge of the window.", [case("1\n", "1\n")], [case("2\n", "2\n")], "2025-02-01T00:00:00"),
    problem("late", "After the window.", [case("1\n", "1\n")], [case("2\n", "2\n")], "2025-02-01T09:00:00"),
]


def gpqa_rows() -> list[dict]:
    keys = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    return [dict(zip(keys, row, strict=True)) for row in GPQA]


def build(root: Path) -> Path:
    """A directory for each benchmark, with the files of both releases."""
    rows = [{"problem": text, "question": text, "answer": answer} for text, answer in MATH]
    for name in ("test", "train"):
        write(root / "aime24" / f"{name}.jsonl", rows)
    write(root / "aime25" / "test.jsonl", rows)
    write(root / "gpqa" / "train.jsonl", gpqa_rows())
    write(root / "livecodebenchv5" / "test.parquet", CODE)
    return root


# What openai_server.py answers to eight samples of each question: right ones, by benchmark.
TRUTH = {
    "aime24": [4, 8, 0],
    "aime25": [4, 8, 0],
    "gpqa": [4, 8],
    "livecodebenchv5": [4, 8, 0],
}
