#!/usr/bin/env python3
"""Compare an FP8 and a BF16 run of the same data and seed: a short report and one figure.

    python training/embedded/quickstart/report.py --fp8 exp/quickstart/cpt_fp8 --bf16 exp/quickstart/cpt_bf16 \\
        --output exp/quickstart/report.md

Everything comes from what the runs left: TensorBoard scalars and the log. The figure is written beside the report.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SMOOTH = 20  # iterations of the running mean in the figure and of the "last" losses in the table


@dataclass(frozen=True)
class Run:
    """One training run. Series are (steps, values) by TensorBoard tag, each step once."""

    directory: Path
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    log: str

    def values(self, tag: str) -> np.ndarray:
        """The values of a tag in the order of their steps."""
        return self.series[tag][1]


class ReportError(Exception):
    """A run that cannot be reported on; the text is one line."""


def read_run(directory: Path) -> Run:
    """Read the TensorBoard scalars and the log under OUT_DIR of a recipe.

    A run that was killed and resumed has steps that were logged twice: the later one is what the weights come from
    (it is equal when the resume was exact). Raises ReportError naming the file or tag that is missing.
    """
    events: dict[str, dict[int, float]] = {}
    for file in sorted((directory / "tensorboard").glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            events.setdefault(tag, {}).update((event.step, event.value) for event in accumulator.Scalars(tag))
    series = {}
    for tag, points in events.items():
        steps = np.array(sorted(points))
        series[tag] = steps, np.array([points[step] for step in steps])
    for tag in ("lm loss", "learning-rate", "lm loss test", "tokens-per-second"):
        if tag not in series:
            raise ReportError(f"{directory}/tensorboard: expected the scalar '{tag}', found {sorted(series) or 'none'}")
    logs = sorted((directory / "logs").glob("train_node*.log"))
    return Run(directory, series, "".join(log.read_text(errors="replace") for log in logs))


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last SMOOTH values (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTH)
    return (sums[ends] - sums[starts]) / (ends - starts)


def figure(fp8: Run, bf16: Run, output: Path) -> None:
    """Loss curves, their relative gap, and the learning rate, above one another."""
    plots, axes = plt.subplots(3, 1, figsize=(8, 9), sharex=True, height_ratios=[3, 2, 1.4], layout="constrained")
    for run, name, colour in ((bf16, "BF16", "tab:blue"), (fp8, "FP8", "tab:orange")):
        steps, loss = run.series["lm loss"]
        axes[0].plot(steps, loss, color=colour, alpha=0.25, linewidth=0.8)
        axes[0].plot(steps, smooth(loss), color=colour, label=f"{name}, mean of {SMOOTH}")
        axes[0].plot(*run.series["lm loss test"], "o", color=colour, label=f"{name}, held out")
    steps, gap = relative_gap(fp8, bf16)
    axes[1].plot(steps, 100 * gap, color="tab:gray", alpha=0.4, linewidth=0.8)
    axes[1].plot(steps, 100 * smooth(gap), color="tab:red", label=f"mean of {SMOOTH}")
    axes[1].axhline(0.0, color="black", linewidth=0.6)
    axes[2].plot(*fp8.series["learning-rate"], color="tab:green")
    axes[0].set(ylabel="loss (nats per token)", title="The same data and seed in FP8 and in BF16")
    axes[1].set(ylabel="(FP8 - BF16) / BF16, %")
    axes[2].set(ylabel="learning rate", xlabel="iteration")
    axes[0].legend()
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    partial = output.with_name(f".{output.name}.partial.png")
    plots.savefig(partial, dpi=120)
    plt.close(plots)
    os.replace(partial, output)


def relative_gap(fp8: Run, bf16: Run) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, (FP8 - BF16) / BF16 of the training loss) where both runs have one."""
    steps, ours, theirs = np.intersect1d(fp8.series["lm loss"][0], bf16.series["lm loss"][0], return_indices=True)
    a, b = fp8.values("lm loss")[ours], bf16.values("lm loss")[theirs]
    return steps, (a - b) / b


def report(fp8: Run, bf16: Run, image: str) -> str:
    """The report as Markdown."""
    steps, gap = relative_gap(fp8, bf16)
    rows = []
    for name, run in (("FP8", fp8), ("BF16", bf16)):
        held = run.values("lm loss test")
        last = run.values("lm loss")[-SMOOTH:].mean()
        rows.append(
            f"| {name} | {held[0]:.4f} | {held[-1]:.4f} | {held[-1] / held[0]:.1%} | {last:.4f} "
            f"| {np.median(run.values('tokens-per-second')):,.0f} |"
        )
    ends = [run.values("lm loss test")[-1] for run in (fp8, bf16)]
    rounding = re.findall(r"^FP8 rounding.*$", fp8.log, re.MULTILINE)
    widest = np.abs(smooth(gap)).max()
    active = rounding[-1] if rounding else f"FP8 rounding: no such line in the log of {fp8.directory}"
    checkpoint = shlex.quote(str(fp8.directory / "checkpoints"))
    return f"""# Continual pre-training in miniature

{len(steps)} iterations of the recipe on real text, once with FP8 and once with BF16 linear layers; data, seed and
every other number are the same.

| run | held-out loss, start | end | end / start | training loss, last {SMOOTH} | tokens/s |
|---|---|---|---|---|---|
{chr(10).join(rows)}

- FP8 against BF16: held-out loss {ends[0] / ends[1] - 1:+.2%}; training loss {gap.mean():+.2%} on average,
  {gap[-SMOOTH:].mean():+.2%} over the last {SMOOTH} iterations, never more than {widest:.2%} as a mean of {SMOOTH}.
  Beside it, BF16 runs of different seeds: `benchmarks/fp8_gap.py` measures both.
- {active}

![losses, their gap and the learning rate]({image})

## Next

- Watch the runs: `.venv/bin/tensorboard --host 127.0.0.1 --logdir {shlex.quote(str(fp8.directory.parent))}`
- Decay from an earlier checkpoint, as the big recipe does from iteration 35000:
  `ls {checkpoint}`, then `bash scripts/CPT/InfiR2_CPT_FP8_tiny_decay.sh --load {checkpoint}/iter_...`
  with the `DATA_PATH` and `TOKENIZER_MODEL` of the quickstart
- See the command that eight H100 would run: `bash scripts/CPT/InfiR2_CPT_FP8_7B.sh --dry-run`
- Read `docs/CPT.md`
"""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp8", type=Path, required=True, help="OUT_DIR of the FP8 run")
    parser.add_argument("--bf16", type=Path, required=True, help="OUT_DIR of the BF16 run")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write; the figure is a .png")
    options = parser.parse_args()
    try:
        fp8, bf16 = read_run(options.fp8), read_run(options.bf16)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    image = options.output.with_suffix(".png")
    figure(fp8, bf16, image)
    text = report(fp8, bf16, image.name)
    partial = options.output.with_name(f".{options.output.name}.partial")
    partial.write_text(text)
    os.replace(partial, options.output)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
