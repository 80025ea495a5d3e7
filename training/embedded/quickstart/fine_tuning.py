"""The fine-tuning half of the quickstart's report: accuracy at every hand-over, the curves of SFT and RL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from training.embedded.quickstart import md
from training.embedded.quickstart.figures import INK, Panel, curve
from training.embedded.quickstart.runs import SMOOTH, STAGES, Quickstart, Run, joined


def with_interval(measured: dict[str, Any]) -> str:
    """An accuracy and its 95 % interval, in percent."""
    low, high = (100 * end for end in measured["interval"])
    return f"{measured['accuracy']:.1%} {md.together(f'({low:.1f} to {high:.1f})')}"


def gain(run: Quickstart) -> tuple[float, bool]:
    """(points of sampled accuracy that RL added, whether the intervals of its start and its end lie apart).

    RL starts from the FP8 model, which is what generates.
    """
    start, end = run.accuracy["sft_stage2_fp8"]["sampled"], run.accuracy["rl_stage2"]["sampled"]
    return 100 * (end["accuracy"] - start["accuracy"]), end["interval"][0] > start["interval"][1]


def accuracies(run: Quickstart) -> str:
    """Markdown of the table of all stages."""
    last, ours, scratch = (run.accuracy[name] for name in ("rl_stage2", "sft_stage2", "sft_scratch2"))
    kinds = ("greedy", "sampled")
    rows = []
    for name, title in STAGES.items():
        one = run.accuracy[name]
        form = "" if one["format"] == "BF16" else f" to {one['format']}"
        rows.append([title + form, *(with_interval(one[kind]) for kind in kinds)])
    points, apart = gain(run)
    return f"""## Accuracy after every stage

Exact answers to {last["questions"]} held-out questions with 95 % intervals; sampled means {
        last["sampled"]["samples"]
    } answers a question at
temperature {last["sampled"]["temperature"]:g}.

{md.table(["after", *kinds], rows, numbers=2)}

- Pre-training: the same two SFT stages reach {ours["greedy"]["accuracy"]:.1%} greedy from the pre-trained model and
  {scratch["greedy"]["accuracy"]:.1%} from random weights.
- RL changed sampled accuracy by {points:+.1f} points; the intervals of its start and its end {
        "do not overlap" if apart else "overlap: with this few questions nothing is shown"
    }.
"""


def section(run: Quickstart, image: str) -> str:
    """Markdown of SFT and RL, with the figure in the file `image`."""
    header = ["RL stage", "rollouts", "reward of all samples drawn", "response tokens"]
    rows = [
        [
            str(number),
            str(len(one.values("train/tis"))),
            _ends(one, "rollout/raw_reward_drawn", ".1%"),
            _ends(one, "rollout/response_lengths", ".1f"),
            f"{one.values('rollout/mult_prob_error').mean():.4f}",
            f"{one.values('rollout/kl_to_trainer').mean():.1e}",
            f"{one.values('train/tis').mean():.4f}",
        ]
        for number, one in enumerate(run.rl, 1)
    ]
    return f"""## SFT and RL

The task is addition of two numbers of two digits, worked out column by column, with a boxed answer. Four fifths of what
pre-training reads are such sums with right answers: half of them in eight wordings as plain text, half of them in the
markup of a conversation, without the box that SFT teaches.
Training, validation and held-out questions are split by a hash of the two numbers: no pair is in two of them, in either
order, and what is pre-trained on is of the training pairs.
In the data of SFT stage 2 **half of the answers are wrong on purpose**, after right steps: a model that has learned
from it answers right only part of the time when it samples, which is what RL with verifiable rewards can repair.

Rollouts ran on weights in 128x128 FP8 blocks, the trainer on its own emulated FP8. What each stage did in its first
and last {SMOOTH // 2} rollouts, and how far the two policies were apart (mean of exp abs log ratio, KL, mean ratio):

{md.table([*header, "mult. prob. error", "KL", "TIS ratio"], rows, numbers=6)}

{md.image(panels(run), image)}
"""


def _ends(run: Run, tag: str, form: str) -> str:
    values = run.values(tag)
    count = max(1, min(SMOOTH // 2, len(values) // 2))
    return f"{format(values[:count].mean(), form)} to {format(values[-count:].mean(), form)}"


def _stages(axes: Axes, runs: Sequence[Run], tag: str, colour: str, label: str | None) -> None:
    """One stage after another; a mean never spans two."""
    start = 0
    for run in runs:
        values = run.values(tag)
        curve(axes, values, colour, label, start + np.arange(len(values)))
        start, label = start + len(values), None


def panels(run: Quickstart) -> list[Panel]:
    """SFT losses beside those from random weights, and RL's rewards and mismatch, both stages in a row."""

    def losses(axes: Axes) -> None:
        _stages(axes, run.scratch, "train/loss", "gray", "from random weights")
        _stages(axes, run.sft, "train/loss", "blue", "from the pre-trained model")
        axes.set(ylabel="loss, nats per token", xlabel="step", yscale="log")
        axes.legend()

    def rewards(axes: Axes) -> None:
        _stages(axes, run.rl, "rollout/raw_reward_drawn", "orange", "training questions")
        start = 0
        for number, one in enumerate(run.rl):
            steps, values = one.series["eval/arithmetic"]
            label = None if number else "validation questions"
            axes.plot(start + steps, values, "o", markersize=4, color=INK["green"], label=label)
            start += len(one.values("train/tis"))
        axes.set(ylabel="reward", xlabel="rollout")
        axes.legend()

    def mismatch(axes: Axes) -> None:
        for tag, offset, colour, label in (
            ("rollout/mult_prob_error", 1.0, "red", "mult. prob. error - 1"),
            ("rollout/kl_to_trainer", 0.0, "purple", "KL(rollout, trainer)"),
        ):
            axes.plot(joined(run.rl, tag) - offset, color=INK[colour], label=label)
        axes.set(ylabel="distance", xlabel="rollout", yscale="log")
        axes.legend()

    validation = [one.values("eval/arithmetic") for one in run.rl]
    return [
        Panel(
            "Loss in SFT, stage 1 then 2",
            f"at the end {joined(run.sft, 'train/loss')[-1]:.3f} from the pre-trained model, "
            f"{joined(run.scratch, 'train/loss')[-1]:.3f} from random weights",
            losses,
        ),
        Panel(
            "Reward in RL, stage 1 then 2",
            f"samples of training questions from {_ends(run.rl[0], 'rollout/raw_reward_drawn', '.0%')} in stage 1, "
            f"{_ends(run.rl[1], 'rollout/raw_reward_drawn', '.0%')} in stage 2; "
            f"validation questions from {validation[0][0]:.0%} to {validation[1][-1]:.0%}",
            rewards,
        ),
        Panel(
            "FP8 rollouts against the trainer",
            f"mean KL {joined(run.rl, 'rollout/kl_to_trainer').mean():.1e}, "
            f"mean mult. prob. error {joined(run.rl, 'rollout/mult_prob_error').mean():.4f}",
            mismatch,
        ),
    ]
