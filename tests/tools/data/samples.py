"""Rows, and files of them, that the tests of the data tools share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st
from pyarrow import parquet

# Any text that a file can hold and that is not blank.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(lambda text: f"t{text}")


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def chat(index: int, **more: Any) -> dict[str, Any]:
    """An SFT row."""
    return {"messages": [user(f"What is {index} + 1?"), assistant(f"It is {index + 1}.")], **more}


def question(index: int, label: Any = None, **more: Any) -> dict[str, Any]:
    """An RL row."""
    return {"prompt": [user(f"What is {index} + 1?")], "label": str(index + 1) if label is None else label, **more}


@st.composite
def conversations(draw: Any, last: str = "assistant") -> list[dict[str, Any]]:
    """What the rules allow: perhaps a system prompt, then questions and answers, perhaps with tools between."""
    messages = [system(draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(TEXTS)), assistant(draw(TEXTS))]
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            messages += [tool(draw(TEXTS)), assistant(draw(TEXTS))]
    return messages if last == "assistant" else [*messages, user(draw(TEXTS))]


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
    return path


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    """The rows as .jsonl or .parquet, by the name."""
    if path.suffix == ".jsonl":
        return jsonl(path, rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [{key: row.get(key) for key in keys} for row in rows]  # pyarrow takes the keys of the first row
    parquet.write_table(pa.Table.from_pylist(columns, schema=schema), path, row_group_size=3)
    return path
