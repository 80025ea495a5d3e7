"""The documents of the repository taken apart: headings, links, code blocks, code spans, tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO

FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1`*\s*$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:a|img)[^>]*?(?:href|src)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced code block and the line of the page where its fence is."""

    language: str
    text: str
    line: int


def files(*patterns: str) -> list[Path]:
    """What belongs to the repository, submodules aside, and what is about to: not what git ignores."""
    listing = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", *patterns)
    found = subprocess.run(listing, cwd=REPO, check=True, capture_output=True, text=True).stdout.splitlines()
    return [REPO / name for name in sorted(found) if (REPO / name).is_file()]


PAGES = files("*.md")


def blocks(text: str) -> list[Block]:
    return [Block(m[2].strip(), m[3], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def prose(text: str) -> str:
    """The page without code blocks and comments, every line where it was."""
    for pattern in (FENCE, COMMENT):
        text = pattern.sub(lambda m: "\n" * m[0].count("\n"), text)
    return text


def spans(text: str) -> list[str]:
    """Code spans outside of code blocks."""
    return [m[2].strip().replace("\\|", "|") for m in SPAN.finditer(prose(text))]


def links(text: str) -> list[str]:
    """Where links and pictures lead, code aside."""
    return [m[1] or m[2] for m in LINK.finditer(SPAN.sub("", prose(text)))]


def headings(text: str) -> list[tuple[int, str]]:
    """(level, text) of each heading."""
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#{1,6}) +(.+?)(?: +#+)? *$", prose(text), re.MULTILINE)]


def anchors(text: str) -> set[str]:
    """What `#...` may name, by GitHub's rule: lower case, no punctuation, spaces as hyphens, repetitions numbered."""
    found: dict[str, int] = {}
    for _, heading in headings(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, the line below the header left out."""
    result = []
    for rows in re.findall(r"(?:^\|.*\|$\n?)+", prose(text), re.MULTILINE):
        split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows.splitlines()]
        result.append([row for row in split if not all(re.fullmatch(r":?-+:?", cell) for cell in row)])
    return result


def commands(text: str) -> Iterator[str]:
    """The commands of the bash blocks: lines that end with a backslash joined, comments removed."""
    for block in blocks(text):
        if block.language == "bash":
            for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines():
                if command := re.sub(r"(^|\s+)#.*", "", line).strip():
                    yield command
