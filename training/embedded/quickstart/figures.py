"""Curves, drawn once as panels: stacked in a PNG beside Markdown, each an SVG in a page that is light or dark."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from training.embedded.quickstart.runs import smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Each colour is a custom property of the page, --NAME, and on a light ground this.
INK = {
    "ink": "#1f2328",
    "faint": "#c6ccd2",
    "blue": "#0b5cad",
    "orange": "#b84a00",
    "green": "#1f7a3a",
    "red": "#b3261e",
    "purple": "#6f42c1",
    "gray": "#63686d",
}
STYLE = {
    "svg.fonttype": "none",  # text that can be read, found and set in the page's font
    "font.size": 8.5,
    "text.color": INK["ink"],
    "axes.edgecolor": INK["gray"],
    "axes.labelcolor": INK["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK["faint"],
    "grid.linewidth": 0.5,
    "xtick.color": INK["ink"],
    "ytick.color": INK["ink"],
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Panel:
    """One plot. description: what it shows, in a sentence, for who cannot see it."""

    title: str
    description: str
    draw: Callable[[Axes], None]


def curve(axes: Axes, values: np.ndarray, colour: str, label: str | None, steps: np.ndarray) -> None:
    """Values, and over them their running mean, which has the label."""
    axes.plot(steps, values, color=INK[colour], alpha=0.3, linewidth=0.7)
    axes.plot(steps, smooth(values), color=INK[colour], label=label)


def png(panels: Sequence[Panel], output: Path) -> None:
    """Write the panels below one another, whole or not at all."""
    with plt.rc_context(STYLE):
        plots = Figure(figsize=(7, 2.8 * len(panels)), layout="constrained")
        for axes, panel in zip(plots.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            panel.draw(axes)
            axes.set_title(panel.title, loc="left")
        partial = output.with_name(f".{output.name}.partial.png")
        plots.savefig(partial, dpi=120)
    os.replace(partial, output)


def svg(panel: Panel) -> str:
    """The panel as <svg> for a page that has the properties of INK; narrow, so that a phone shows its text."""
    with plt.rc_context({**STYLE, "svg.hashsalt": panel.title}):
        plot = Figure(figsize=(3.6, 2.5), layout="constrained")
        plot.patch.set_alpha(0.0)
        axes = plot.subplots()
        axes.patch.set_alpha(0.0)
        panel.draw(axes)
        text = io.StringIO()
        plot.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = re.sub(r"<g id=\"[^\"]*\"", "<g", text.getvalue())  # the same in every panel, and nothing refers to them
    drawn = re.sub("|".join(INK.values()), lambda found: f"var(--{_name(found[0])})", drawn)
    drawn = re.sub(r"<(metadata|style).*?</\1>", "", drawn, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', drawn)[0]
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    label = html.escape(panel.description)
    return f'<svg {size} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}">{body}'


def _name(colour: str) -> str:
    return next(name for name, value in INK.items() if value == colour)
