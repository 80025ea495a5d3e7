"""What a training run left behind, for reports: TensorBoard scalars and the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


PRETRAINING_TAGS = ("lm loss", "learning-rate", "lm loss test", "tokens-per-second")


def read_run(directory: Path, tags: Sequence[str] = PRETRAINING_TAGS) -> Run:
    """Read the TensorBoard scalars and the log under OUT_DIR of a recipe. tags: those that must be there.

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
    for tag in tags:
        if tag not in series:
            raise ReportError(f"{directory}/tensorboard: expected the scalar '{tag}', found {sorted(series) or 'none'}")
    logs = sorted((directory / "logs").glob("train*.log"))
    return Run(directory, series, "".join(log.read_text(errors="replace") for log in logs))


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last SMOOTH values (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTH)
    return (sums[ends] - sums[starts]) / (ends - starts)
