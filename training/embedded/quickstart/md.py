"""Markdown from parts that may hold anything: what was text stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from training.embedded.quickstart.figures import Panel


def plain(text: str) -> str:
    """Text in which no character means anything."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A code span, also in a table."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", r"\|")


def together(text: str) -> str:
    """Words that no line break parts."""
    return text.replace(" ", "\u00a0")


def block(lines: Iterable[str], language: str = "bash") -> str:
    """A block of code."""
    text = "\n".join(lines)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table of Markdown cells. numbers: how many of the columns, from the right, hold numbers."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def image(panels: Sequence[Panel], file: str) -> str:
    """A picture that shows some panels, by the name of its file; it stands in a paragraph of its own."""
    text = "; ".join(f"{panel.title}: {panel.description}" for panel in panels)
    return f"![{plain(text)}]({quote(file)})"
