#!/usr/bin/env python3
"""Draw docs/pipeline.svg, the picture of the README, from docs/pipeline.txt.  Standard library only.

Boxes stand on a grid; an arrow joins two neighbours.  The picture has a ground of its own, so that it can be read on a
light and on a dark page, and follows the reader's colour scheme where the viewer tells it.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, GAP_X, GAP_Y, LEFT, TOP, LINE = 138, 76, 22, 66, 16, 42, 18  # pixels
FONT = 'font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif'
STYLE = f"""<style>
text {{ {FONT}; text-anchor: middle }} .left {{ text-anchor: start }} .name {{ font-weight: 600; font-size: 14px }}
rect, line {{ stroke-width: 1.5 }} .none {{ fill: none }} line {{ stroke: #59636e; marker-end: url(#head) }}
text, #head {{ fill: #59636e }} .name {{ fill: #1f2328 }} .ground {{ fill: #ffffff; stroke: #d0d7de }}
.train {{ fill: #ddf4ff; stroke: #0969da }} .model {{ fill: #f6f8fa; stroke: #818b98 }}
.eval {{ fill: #dafbe1; stroke: #1a7f37 }}
@media (prefers-color-scheme: dark) {{
text, #head {{ fill: #9198a1 }} .name {{ fill: #f0f6fc }} .ground {{ fill: #0d1117; stroke: #3d444d }}
.train {{ fill: #121d2f; stroke: #4493f8 }} .model {{ fill: #151b23; stroke: #656c76 }}
.eval {{ fill: #12261e; stroke: #3fb950 }} line {{ stroke: #9198a1 }}
}}
</style>
<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">
<path d="M0 0L8 4L0 8z"/></marker>"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def corner(column: int, row: int) -> tuple[int, int]:
    """Left and upper edge of a box."""
    return LEFT + column * (WIDTH + GAP_X), TOP + row * (HEIGHT + GAP_Y)


def box(place: tuple[int, int], kind: str, lines: list[str]) -> list[str]:
    x, y = corner(*place)
    words = [text(x + WIDTH / 2, y + 24 + LINE * n, line, "" if n else "name") for n, line in enumerate(lines)]
    return [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" class="{kind}"/>', *words]


def arrow(start: tuple[int, int], end: tuple[int, int], label: list[str]) -> list[str]:
    """Along a row to the right, or along a column to the other row."""
    (x, y), (to_x, to_y) = corner(*start), corner(*end)
    x1, y1, x2, y2 = x + WIDTH, y + HEIGHT / 2, to_x - 2, to_y + HEIGHT / 2
    if y != to_y:
        x1 = x2 = x + WIDTH / 2
        y1, y2 = (y + HEIGHT, to_y - 2) if y < to_y else (y, to_y + HEIGHT + 2)
    first = (y1 + y2) / 2 + 5 - 7 * len(label)
    words = [text(x1 + 8, first + 15 * n, line, "left") for n, line in enumerate(label)]
    return [f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>', *words]


def draw(description: str) -> str:
    """The picture as SVG.  Raises ValueError for a line of another kind, KeyError for an arrow to an unknown box."""
    about, places, shapes = [], {}, []
    for line in filter(None, (line.partition("#")[0].strip() for line in description.splitlines())):
        head, *texts = (part.strip() for part in line.split("|"))
        kind, *words = head.split()
        if kind in ("title", "desc"):
            about.append(f'<{kind} id="{kind}">{escape(texts[0])}</{kind}>')
        elif kind == "lane":
            shapes.append(text(LEFT, corner(0, int(words[0]))[1] - 14, texts[0], "left"))
        elif kind == "box":
            places[words[0]] = int(words[1]), int(words[2])
            shapes += box(places[words[0]], words[3], texts)
        elif kind == "arrow":
            shapes += arrow(places[words[0]], places[words[1]], texts)
        else:
            raise ValueError(f"expected title, desc, lane, box or arrow, found {line!r}")
    right, bottom = corner(1 + max(x for x, _ in places.values()), 1 + max(y for _, y in places.values()))
    width, height = right - GAP_X + LEFT, bottom - GAP_Y + LEFT
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc">'
    ground = f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="8" class="ground"/>'
    return "\n".join([opening, *about, STYLE, ground, *shapes, "</svg>\n"])


if __name__ == "__main__":
    source = Path(__file__).resolve().with_suffix(".txt")
    source.with_suffix(".svg").write_text(draw(source.read_text("utf-8")), "utf-8")
