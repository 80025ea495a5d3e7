"""The fine-tuning half of the quickstart's report: accuracy at every hand-over, the curves of SFT and RL."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib
import numpy as np

from training.embedded.quickstart.runs import SMOOTH, ReportError, Run, read_run, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Name of the accuracy file -> what the table says.
STAGES = {
    "cpt_fp8": "after pre-training",
    "sft_scratch2": "SFT from random weights, both stages",
    "sft_stage1": "SFT stage 1",
    "sft_stage2": "SFT stage 2",
    "sft_stage2_fp8": "SFT stage 2, cast to FP8",
    "rl_stage1": "RL stage 1",
    "rl_stage2": "RL stage 2",
}
SFT_TAGS = ("train/loss", "train/grad_norm")
RL_TAGS = (
    *("rollout/raw_reward_drawn", "rollout/response_lengths", "rollout/mult_prob_error", "rollout/kl_to_trainer"),
    *("train/tis", "train/pg_clipfrac", "train/entropy_loss", "train/grad_norm", "eval/arithmetic"),
)


def read_accuracy(folder: Path) -> dict[str, dict]:
    """What accuracy.py measured, by stage. Raises ReportError naming a file that is missing."""
    found = {}
    for name in STAGES:
        file = folder / f"{name}.json"
        if not file.is_file():
            raise ReportError(f"{file}: expected the accuracy of this stage, found no such file")
        found[name] = json.loads(file.read_text())
    return found


def gain(accuracy: dict[str, dict]) -> tuple[float, bool]:
    """(points of sampled accuracy that RL added, whether the intervals of its start and its end lie apart).

    RL starts from the FP8 model, which is what generates.
    """
    start, end = accuracy["sft_stage2_fp8"]["sampled"], accuracy["rl_stage2"]["sampled"]
    return 100 * (end["accuracy"] - start["accuracy"]), end["interval"][0] > start["interval"][1]


def section(folder: Path, image: str) -> str:
    """Markdown of the fine-tuning stages of a quickstart in `folder`."""
    accuracy = read_accuracy(folder / "accuracy")
    rl = [read_run(folder / name, RL_TAGS) for name in ("rl_stage1", "rl_stage2")]
    rows = []
    for name, title in STAGES.items():
        cells = []
        for kind in ("greedy", "sampled"):
            low, high = accuracy[name][kind]["interval"]
            cells.append(f"{accuracy[name][kind]['accuracy']:.1%} ({low:.1%} to {high:.1%})")
        rows.append(f"| {title} | {accuracy[name]['format']} | {' | '.join(cells)} |")
    points, apart = gain(accuracy)
    first = accuracy["rl_stage2"]
    stages = [
        f"| {number} | {len(run.values('train/tis'))} | {_ends(run, 'rollout/raw_reward_drawn', '.1%')} "
        f"| {_ends(run, 'rollout/response_lengths', '.1f')} | {run.values('rollout/mult_prob_error').mean():.4f} "
        f"| {run.values('rollout/kl_to_trainer').mean():.1e} | {run.values('train/tis').mean():.4f} |"
        for number, run in enumerate(rl, 1)
    ]
    return f"""# Fine-tuning in miniature

The task is addition of two numbers of two digits, worked out column by column, with a boxed answer. Training,
validation and held-out questions are split by a hash of the two numbers: no pair is in two of them, in either order.
In the data of SFT stage 2 **half of the answers are wrong on purpose**, after right steps: a model that has learned
from it answers right only part of the time when it samples, which is what RL with verifiable rewards can repair.

Exact-match accuracy on {first["questions"]} held-out questions with 95 % intervals; sampled means
{first["sampled"]["samples"]} answers a question at temperature {first["sampled"]["temperature"]:g}:

| after | format | greedy | sampled |
|---|---|---|---|
{chr(10).join(rows)}

- RL raised sampled accuracy by {points:.1f} points; the intervals of its start and its end {
        "do not overlap" if apart else "overlap: with this few questions nothing is shown"
    }.
- Rollouts ran on weights in 128x128 FP8 blocks, the trainer on its own emulated FP8. What each stage did in its first
  and last {SMOOTH // 2} rollouts, and how far the two policies were apart (mean of exp abs log ratio, KL, mean ratio):

| RL stage | rollouts | reward of all samples drawn | response tokens | mult. prob. error | KL | TIS ratio |
|---|---|---|---|---|---|---|
{chr(10).join(stages)}

![losses of SFT, rewards and mismatch of RL]({image})
"""


def _ends(run: Run, tag: str, form: str) -> str:
    values = run.values(tag)
    count = max(1, min(SMOOTH // 2, len(values) // 2))
    return f"{format(values[:count].mean(), form)} to {format(values[-count:].mean(), form)}"


def figure(folder: Path, output: Path) -> None:
    """SFT losses beside those from random weights, and RL's rewards and mismatch, both stages in a row."""
    plots, axes = plt.subplots(3, 1, figsize=(8, 9), layout="constrained")
    for names, label, colour in (
        (("sft_stage1", "sft_stage2"), "from the pre-trained model", "tab:blue"),
        (("sft_scratch1", "sft_scratch2"), "from random weights", "tab:gray"),
    ):
        loss = _joined([read_run(folder / name, SFT_TAGS) for name in names], "train/loss")
        axes[0].plot(loss, color=colour, alpha=0.25, linewidth=0.8)
        axes[0].plot(smooth(loss), color=colour, label=label)
    rl = [read_run(folder / name, RL_TAGS) for name in ("rl_stage1", "rl_stage2")]
    reward = _joined(rl, "rollout/raw_reward_drawn")
    axes[1].plot(reward, color="tab:orange", alpha=0.3, linewidth=0.8)
    axes[1].plot(smooth(reward), color="tab:orange", label="training questions")
    start = 0
    for number, run in enumerate(rl):
        steps, values = run.series["eval/arithmetic"]
        axes[1].plot(start + steps, values, "o", color="tab:green", label=None if number else "validation questions")
        start += len(run.values("train/tis"))
    axes[2].plot(_joined(rl, "rollout/mult_prob_error") - 1.0, color="tab:red", label="mult. prob. error - 1")
    axes[2].plot(_joined(rl, "rollout/kl_to_trainer"), color="tab:purple", label="KL(rollout, trainer)")
    axes[0].set(ylabel="SFT loss (nats per token)", xlabel="step", title="SFT and RL, both stages one after another")
    axes[1].set(ylabel="reward", xlabel="rollout")
    axes[2].set(ylabel="FP8 rollout against trainer", xlabel="rollout", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    partial = output.with_name(f".{output.name}.partial.png")
    plots.savefig(partial, dpi=120)
    plt.close(plots)
    os.replace(partial, output)


def _joined(runs: list[Run], tag: str) -> np.ndarray:
    return np.concatenate([run.values(tag) for run in runs])
