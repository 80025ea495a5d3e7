#!/usr/bin/env python3
"""The quickstart's report: FP8 beside BF16 in pre-training, what SFT and RL made of the model, FP8 beside BF16 again.

    python training/embedded/quickstart/report.py --quickstart exp/quickstart --output exp/quickstart/report.md

Everything comes from what the stages left: TensorBoard scalars, logs, measured accuracies and evaluation. Two
figures are written beside the report.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

from training.embedded.quickstart import fine_tuning  # noqa: E402
from training.embedded.quickstart.runs import SMOOTH, ReportError, Run, read_run, smooth  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


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
    """Markdown of the pre-training part."""
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
"""


def evaluation(folder: Path) -> str:
    """The tables of eval/summarize.py."""
    file = folder / "evaluation" / "summary.md"
    if not file.is_file():
        raise ReportError(f"{file}: expected the summary of the evaluation, found no such file")
    return f"""# Evaluation in miniature

The model after RL, in BF16 and cast to FP8, behind `transformers serve`, measured by evalscope as `eval/aime24_eval.sh`
measures the big models; the questions are held-out ones in the format of AIME.

{file.read_text()}"""


def following(folder: Path) -> str:
    """What to do after the quickstart."""
    checkpoint = shlex.quote(str(folder / "cpt_fp8" / "checkpoints"))
    return f"""# Next

- Watch the runs: `.venv/bin/tensorboard --host 127.0.0.1 --logdir {shlex.quote(str(folder))}`
- Decay from an earlier checkpoint, as the big recipe does from iteration 35000:
  `ls {checkpoint}`, then `bash scripts/CPT/InfiR2_CPT_FP8_tiny_decay.sh --load {checkpoint}/iter_...`
  with the `DATA_PATH` and `TOKENIZER_MODEL` of the quickstart
- See the commands that H100 nodes would run: `bash scripts/CPT/InfiR2_CPT_FP8_7B.sh --dry-run`, and the same for
  `scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh` and `scripts/RL/InfiR2_RL_FP8_7B_stage1_4node.sh`
- Read `docs/CPT.md`, `docs/SFT.md`, `docs/RL.md`, `docs/EVAL.md`
"""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the folder of scripts/quickstart.sh")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write; figures are .png")
    options = parser.parse_args()
    folder, output = options.quickstart, options.output
    curves, tuning = output.with_suffix(".png"), output.with_name(f"{output.stem}_fine_tuning.png")
    try:
        fp8, bf16 = read_run(folder / "cpt_fp8"), read_run(folder / "cpt_bf16")
        parts = [report(fp8, bf16, curves.name), fine_tuning.section(folder, tuning.name)]
        text = "\n".join([*parts, evaluation(folder), following(folder)])
        figure(fp8, bf16, curves)
        fine_tuning.figure(folder, tuning)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(text)
    os.replace(partial, output)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
