"""What the stages of a quickstart left behind, for reports: TensorBoard scalars, logs, accuracies, the evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMOOTH = 20  # iterations of the running mean in the figures and of the "last" losses in the table
PRETRAINING_TAGS = ("lm loss", "learning-rate", "lm loss test", "tokens-per-second")
SFT_TAGS = ("train/loss", "train/grad_norm")
RL_TAGS = (
    *("rollout/raw_reward_drawn", "rollout/response_lengths", "rollout/mult_prob_error", "rollout/kl_to_trainer"),
    *("train/tis", "train/pg_clipfrac", "train/entropy_loss", "train/grad_norm", "eval/arithmetic"),
)
# Name of the accuracy file -> what the table says.
STAGES = {
    "cpt_fp8": "pre-training",
    "sft_scratch2": "SFT from random weights, both stages",
    "sft_stage1": "SFT stage 1",
    "sft_stage2": "SFT stage 2",
    "sft_stage2_fp8": "SFT stage 2, cast",
    "rl_stage1": "RL stage 1",
    "rl_stage2": "RL stage 2",
}


@dataclass(frozen=True)
class Run:
    """One training run. Series are (steps, values) by TensorBoard tag, each step once."""

    directory: Path
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    log: str

    def values(self, tag: str) -> np.ndarray:
        """The values of a tag in the order of their steps."""
        return self.series[tag][1]


@dataclass(frozen=True)
class Quickstart:
    """All stages. Pairs of runs are stages 1 and 2; accuracy is what accuracy.py measured, by STAGES."""

    folder: Path
    fp8: Run
    bf16: Run
    sft: tuple[Run, Run]
    scratch: tuple[Run, Run]  # SFT from random weights
    rl: tuple[Run, Run]
    accuracy: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]  # eval/summarize.py: its numbers
    evaluation_tables: str  # and its Markdown


class ReportError(Exception):
    """A run that cannot be reported on; the text is one line."""


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


def read_quickstart(folder: Path) -> Quickstart:
    """Read everything that a report needs. Raises ReportError naming the first thing that is missing."""
    return Quickstart(
        folder,
        fp8=read_run(folder / "cpt_fp8"),
        bf16=read_run(folder / "cpt_bf16"),
        sft=_pair(folder / "sft_stage", SFT_TAGS),
        scratch=_pair(folder / "sft_scratch", SFT_TAGS),
        rl=_pair(folder / "rl_stage", RL_TAGS),
        accuracy={name: json.loads(_text(folder / "accuracy" / f"{name}.json")) for name in STAGES},
        evaluation=json.loads(_text(folder / "evaluation" / "summary.json")),
        evaluation_tables=_text(folder / "evaluation" / "summary.md"),
    )


def _pair(stem: Path, tags: Sequence[str]) -> tuple[Run, Run]:
    return read_run(stem.with_name(f"{stem.name}1"), tags), read_run(stem.with_name(f"{stem.name}2"), tags)


def _text(file: Path) -> str:
    if not file.is_file():
        raise ReportError(f"{file}: expected what this stage measured, found no such file")
    return file.read_text()


def joined(runs: Sequence[Run], tag: str) -> np.ndarray:
    """The values of a tag in one run after another."""
    return np.concatenate([run.values(tag) for run in runs])


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last SMOOTH values (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTH)
    return (sums[ends] - sums[starts]) / (ends - starts)


def relative_gap(fp8: Run, bf16: Run) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, (FP8 - BF16) / BF16 of the training loss) where both runs have one."""
    steps, ours, theirs = np.intersect1d(fp8.series["lm loss"][0], bf16.series["lm loss"][0], return_indices=True)
    a, b = fp8.values("lm loss")[ours], bf16.values("lm loss")[theirs]
    return steps, (a - b) / b
