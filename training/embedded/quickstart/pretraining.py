"""The pre-training part of the quickstart's report: FP8 beside BF16, the same in all else."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.axes import Axes

from training.embedded.quickstart import md
from training.embedded.quickstart.figures import INK, Panel, curve
from training.embedded.quickstart.runs import SMOOTH, Quickstart, Run, relative_gap, smooth


def held_out_gap(run: Quickstart) -> float:
    """(FP8 - BF16) / BF16 of the held-out loss at the end."""
    ends = [one.values("lm loss test")[-1] for one in (run.fp8, run.bf16)]
    return float(ends[0] / ends[1] - 1)


def section(run: Quickstart, image: str) -> str:
    """Markdown, with the figure in the file `image`."""
    steps, gap = relative_gap(run.fp8, run.bf16)
    rows = []
    for name, one in (("BF16", run.bf16), ("FP8", run.fp8)):
        held = one.values("lm loss test")
        last = one.values("lm loss")[-SMOOTH:].mean()
        speed = np.median(one.values("tokens-per-second"))
        rows.append(
            [name, f"{held[0]:.4f}", f"{held[-1]:.4f}", f"{held[-1] / held[0]:.1%}", f"{last:.4f}", f"{speed:,.0f}"]
        )
    header = ["run", "held-out loss, start", "end", "end / start", f"training loss, last {SMOOTH}", "tokens/s"]
    rounding = re.findall(r"^FP8 rounding.*$", run.fp8.log, re.MULTILINE)
    active = rounding[-1] if rounding else f"FP8 rounding: no such line in the log of {run.fp8.directory}"
    return f"""## Pre-training

{len(steps)} iterations of the recipe on real text and worked sums, once with FP8 and once with BF16 linear layers;
data, seed and every other number are the same.

{md.table(header, rows, numbers=5)}

- FP8 against BF16: held-out loss {held_out_gap(run):+.2%}; training loss {gap.mean():+.2%} on average,
  {gap[-SMOOTH:].mean():+.2%} over the last {SMOOTH} iterations, never more than {np.abs(smooth(gap)).max():.2%} as a
  mean of {SMOOTH}.
- {md.plain(active)}

{md.image(panels(run), image)}
"""


def panels(run: Quickstart) -> list[Panel]:
    """Losses, their relative gap, and the learning rate."""
    steps, gap = relative_gap(run.fp8, run.bf16)

    def losses(axes: Axes) -> None:
        for one, name, colour in ((run.bf16, "BF16", "blue"), (run.fp8, "FP8", "orange")):
            iterations, loss = one.series["lm loss"]
            curve(axes, loss, colour, f"{name}, mean of {SMOOTH}", iterations)
            axes.plot(*one.series["lm loss test"], "o", markersize=4, color=INK[colour], label=f"{name}, held out")
        axes.set(ylabel="loss, nats per token", xlabel="iteration")
        axes.legend()

    def gaps(axes: Axes) -> None:
        curve(axes, 100 * gap, "red", f"mean of {SMOOTH}", steps)
        axes.axhline(0.0, color=INK["ink"], linewidth=0.7)
        axes.set(ylabel="(FP8 - BF16) / BF16, %", xlabel="iteration")
        axes.legend()

    def rates(axes: Axes) -> None:
        axes.plot(*run.fp8.series["learning-rate"], color=INK["green"])
        axes.set(ylabel="learning rate", xlabel="iteration")

    return [
        Panel("Loss in pre-training", f"{_course(run.bf16, 'BF16')}, {_course(run.fp8, 'FP8')}", losses),
        Panel(
            "FP8 against BF16, training loss",
            f"{gap.mean():+.2%} on average, at most {np.abs(smooth(gap)).max():.2%} apart as a mean of {SMOOTH}",
            gaps,
        ),
        Panel("Learning rate", "warm-up, a constant stretch, decay", rates),
    ]


def _course(run: Run, name: str) -> str:
    loss = run.values("lm loss")
    return f"{name} from {loss[0]:.2f} to {smooth(loss)[-1]:.2f}"
