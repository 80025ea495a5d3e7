"""The part of a quickstart that its report reads, made in a second: curves of known values, real TensorBoard files."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from training.embedded.quickstart.runs import STAGES

ITERATIONS, STEPS, ROLLOUTS = 60, 40, 25
SAMPLED = dict(zip(STAGES, (0.0, 0.042, 0.902, 0.482, 0.484, 0.807, 0.874), strict=True))
ROUNDING = (
    "FP8 rounding: 28 of 29 linear layers in E4M3 blocks with power-of-two scales; it moves their weights by 2.66%"
)
COMMAND = "SEED=1236 bash scripts/quickstart.sh"


def scalars(directory: Path, values: dict[str, dict[int, float]], log: str = "") -> None:
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for tag, points in values.items():
            for step, value in points.items():
                writer.add_scalar(tag, value, step)
    (directory / "logs").mkdir()
    (directory / "logs" / "train.log").write_text(log)


def build(folder: Path, rounding: str = ROUNDING) -> Path:
    """Make `folder`. rounding: the line in the log of pre-training that the report quotes."""
    log = f"model: 3,674,368 parameters on cpu, started from random weights (seed 1236)\n{rounding}\n"
    for name, factor in (("cpt_fp8", 0.99), ("cpt_bf16", 1.0)):
        loss = {step: factor * (2.5 + 5.0 * math.exp(-step / 10)) for step in range(1, ITERATIONS + 1)}
        rate = dict.fromkeys(loss, 1e-3)
        held = {0: 7.6, ITERATIONS: factor * 2.5}
        speed = dict.fromkeys(loss, 3000.0)
        tags = {"lm loss": loss, "learning-rate": rate, "lm loss test": held, "tokens-per-second": speed}
        scalars(folder / name, tags, log)
    for name in ("sft_stage1", "sft_stage2", "sft_scratch1", "sft_scratch2"):
        loss = {step: 6.0 * math.exp(-step / 8) + 0.01 for step in range(STEPS)}
        scalars(folder / name, {"train/loss": loss, "train/grad_norm": loss})
    for name in ("rl_stage1", "rl_stage2"):
        steps = range(ROLLOUTS)
        reward = {step: 0.5 + 0.4 * step / ROLLOUTS for step in steps}
        near = {step: 1.0006 + 1e-4 * math.sin(step) for step in steps}
        flat = ("rollout/response_lengths", "train/tis", "train/pg_clipfrac", "train/entropy_loss", "train/grad_norm")
        tags = {tag: dict.fromkeys(steps, 1.0) for tag in flat}
        tags |= {"rollout/raw_reward_drawn": reward, "rollout/mult_prob_error": near}
        tags |= {"rollout/kl_to_trainer": {step: 1e-5 * (2 + math.cos(step)) for step in steps}}
        scalars(folder / name, tags | {"eval/arithmetic": {0: 0.9, ROLLOUTS - 1: 1.0}})
    (folder / "accuracy").mkdir()
    for name, accuracy in SAMPLED.items():
        one = {"accuracy": accuracy, "interval": [max(0.0, accuracy - 0.02), accuracy + 0.02], "tokens": 28.0}
        sampled = one | {"samples": 8, "temperature": 1.0}
        form = "FP8" if name.endswith("fp8") and name != "cpt_fp8" else "BF16"
        text = json.dumps({"format": form, "questions": 200, "greedy": one, "sampled": sampled})
        (folder / "accuracy" / f"{name}.json").write_text(text)
    evaluation(folder, difference=-3.0, low=-10.0, high=3.5)
    stages = [("corpus", 6), ("cpt_fp8", 61), ("cpt_fp8", 80)]
    lines = [f"{stage}\t{seconds}\t0123456789ab\t{COMMAND}\n" for stage, seconds in stages]
    (folder / "stages.tsv").write_text("".join(lines))
    return folder


def evaluation(folder: Path, difference: float, low: float | None, high: float | None) -> None:
    runs = [{"model": "FP8", "average": 88.0 + difference}, {"model": "BF16", "average": 88.0}]
    noise = low is None or low <= 0.0 <= high
    compared = {"first": "BF16", "second": "FP8", "difference": difference, "low": low, "high": high}
    (folder / "evaluation").mkdir(exist_ok=True)
    text = json.dumps({"runs": runs, "comparisons": [compared | {"inside_noise": noise}]})
    (folder / "evaluation" / "summary.json").write_text(text)
    (folder / "evaluation" / "summary.md").write_text("| benchmark | avg@k |\n|---|---|\n| arithmetic | 85.00 |\n")
