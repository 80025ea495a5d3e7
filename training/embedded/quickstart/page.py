"""Markdown as one HTML file that needs no other: styles and figures are in it, scripts and requests are forbidden."""

from __future__ import annotations

import html
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from training.embedded.quickstart.figures import Panel, svg

STYLE = Path(__file__).with_name("page.css")
# Whatever a log held: no script runs and nothing is fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(markdown: str, figures: dict[str, list[Panel]]) -> str:
    """The page. figures: what stands for each picture that is alone in its paragraph, by the name of its file.

    The first heading is the title. HTML in the Markdown is shown as text.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = _boxed(_drawn(parser.parse(markdown), figures))
    title = next(token.content for token in tokens if token.type == "inline")
    body = parser.renderer.render(tokens, parser.options, {})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def _drawn(tokens: list[Token], figures: dict[str, list[Panel]]) -> list[Token]:
    """Paragraphs that are a picture become its panels."""
    made: list[Token] = []
    for token in tokens:
        made.append(token)
        children = token.children or []
        if token.type == "inline" and [child.type for child in children] == ["image"]:
            shown = "".join(map(_figure, figures[unquote(str(children[0].attrs["src"]))]))
            made[-2:] = [Token("html_block", "", 0, content=f'<div class="figures">\n{shown}</div>\n')]
        elif token.type == "paragraph_close" and made[-2].type == "html_block":
            made.pop()
    return made


def _figure(panel: Panel) -> str:
    caption = f"<b>{html.escape(panel.title)}</b> {html.escape(panel.description)}"
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{svg(panel)}</figure>\n"


def _boxed(tokens: list[Token]) -> list[Token]:
    """What may be wider than a phone scrolls in a box of its own, by keyboard too."""
    made: list[Token] = []
    heading = ""
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[number + 1].content
        if token.type == "fence":
            token.attrSet("tabindex", "0")
        if token.type == "table_open":
            box = f'<div class="box" role="region" tabindex="0" aria-label="Table: {html.escape(heading)}">\n'
            made.append(Token("html_block", "", 0, content=box))
        made.append(token)
        if token.type == "table_close":
            made.append(Token("html_block", "", 0, content="</div>\n"))
    return made
