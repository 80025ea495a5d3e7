#!/usr/bin/env python3
"""The quickstart's report: what every stage made of the model, FP8 beside BF16, and where the numbers come from.

    python training/embedded/quickstart/report.py --quickstart exp/quickstart --output exp/quickstart/report.html

Everything comes from what the stages left: TensorBoard scalars, logs, measured accuracies and evaluation. The page is
one file that needs no other; the same text is written beside it as Markdown, with two figures.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from training.embedded.quickstart import figures, fine_tuning, md, page, pretraining, provenance  # noqa: E402
from training.embedded.quickstart.runs import Quickstart, ReportError, read_quickstart  # noqa: E402


def noise(inside: bool) -> str:
    """A verdict in words."""
    return "inside noise" if inside else "a difference"


def points(value: float, low: float | None, high: float | None) -> str:
    """A difference in points with its 95 % interval, as far as there is one."""
    interval = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
    return f"{md.together(f'{value:+.1f} points')}{interval[:1]}{md.together(interval[1:])}"


def opening(run: Quickstart) -> str:
    """What this was, and what came out; the list is what the quickstart says last."""
    size = re.search(r"^model: ([\d,]+) parameters", run.fp8.log, re.MULTILINE)
    sampled = {name: f"{one['sampled']['accuracy']:.1%}" for name, one in run.accuracy.items()}
    compared = run.evaluation["comparisons"][0]
    return f"""# The InfiR2 recipe in miniature

A Qwen2.5 of {size[1] if size else "few"} parameters went through the whole recipe on this machine: pre-training, two
stages of SFT, two of RL with FP8 rollouts, and evaluation, with FP8 beside BF16 where both can run. All numbers were
measured in this run; they show that the recipe works and what FP8 costs at this size, not how good a big model gets.

- Sums of held-out numbers, sampled answers that are right: {sampled["cpt_fp8"]} after pre-training, \
{sampled["sft_stage2"]} after SFT, {sampled["rl_stage2"]} after RL.
- FP8 against BF16: held-out loss {pretraining.held_out_gap(run):+.2%} in pre-training, one pair of runs; \
accuracy after RL {compared["difference"]:+.1f} points, {noise(compared["inside_noise"])}.
"""


def comparison(run: Quickstart) -> str:
    """FP8 beside BF16 wherever both were measured."""
    held = [one.values("lm loss test")[-1] for one in (run.bf16, run.fp8)]
    tuned = [run.accuracy[name]["sampled"] for name in ("sft_stage2", "sft_stage2_fp8")]
    change = 100 * (tuned[1]["accuracy"] - tuned[0]["accuracy"])
    # As if the samples of the two were independent: they answer the same questions, so that this is wide.
    half = 50 * math.hypot(*(one["interval"][1] - one["interval"][0] for one in tuned))
    after = run.evaluation["comparisons"][0]
    scores = {one["model"]: f"{one['average']:.1f}%" for one in run.evaluation["runs"]}
    rows = [
        ["pre-training, held-out loss", f"{held[0]:.4f}", f"{held[1]:.4f}", f"{held[1] / held[0] - 1:+.2%}, one pair"],
        [
            *("SFT stage 2, sampled", *(f"{one['accuracy']:.1%}" for one in tuned)),
            f"{points(change, change - half, change + half)}, {noise(abs(change) <= half)}",
        ],
        [
            *("RL stage 2, evaluation", scores[after["first"]], scores[after["second"]]),
            f"{points(after['difference'], after['low'], after['high'])}, {noise(after['inside_noise'])}",
        ],
    ]
    return f"""## FP8 beside BF16

{md.table(["measured", "BF16", "FP8", "FP8 against BF16"], rows)}

Pre-training: two runs that differ in the precision alone. After SFT and after RL: one model, and its weights cast to
FP8. Differences of accuracy have 95 % intervals; inside noise: zero is in it, which one of twenty equal pairs misses by
chance. One pair has no interval: the loss of pre-training drops when the model gets the sums, which happens sooner in
one run than in another. `benchmarks/fp8_gap.py` compares more pairs, on text alone, with what another seed changes, and
`docs/EMBEDDED.md` has its numbers.
"""


def evaluation(run: Quickstart) -> str:
    """The tables of eval/summarize.py."""
    return f"""## Evaluation

The model after RL, in BF16 and cast to FP8, behind `transformers serve`, measured by evalscope as `eval/aime24_eval.sh`
measures the big models; the questions are held-out ones in the format of AIME.

{run.evaluation_tables}"""


def limits() -> str:
    """What a reader might take from the numbers and should not."""
    return """## What these numbers do not say

- The data is made for this: sums, half of the answers for SFT stage 2 wrong on purpose. RL has something to repair.
- Pre-training reads mostly such sums: what it is worth to the fine-tuning here says nothing about other text.
- One seed. `docs/EMBEDDED.md` has three.
- FP8 is emulated where no GPU has it: its rounding is that of the big runs, its speed says nothing about one.
"""


def following(run: Quickstart) -> str:
    """Where everything is and what to do next."""
    folder = shlex.quote(str(run.folder))
    earlier = min((path.name for path in run.folder.glob("cpt_fp8/checkpoints/iter_*")), default="iter_...")
    rows = [
        ("`cpt_fp8`, `cpt_bf16`, `sft_*`, `rl_*`", "runs: `checkpoints`, `tensorboard`, `logs`"),
        ("`*_hf`, `*_fp8`", "their weights for Hugging Face, in BF16 and in FP8"),
        ("`accuracy`, `evaluation`", "measurements, in JSON"),
        ("`arithmetic`, `corpus.jsonl`, `data`, `tokenizer`", "what training read"),
        ("`quickstart.log`, `stages.tsv`", "all that the stages printed; their seconds and commands"),
    ]
    steps = [
        ("Watch the runs.", f".venv/bin/tensorboard --host 127.0.0.1 --logdir {folder}"),
        (
            "Decay from an earlier checkpoint, as the big recipe does from iteration 35000.",
            f"TOKENIZER_MODEL={folder}/tokenizer bash scripts/CPT/InfiR2_CPT_FP8_tiny_decay.sh \\",
            f"  --load {folder}/cpt_fp8/checkpoints/{earlier} \\",
            f"  --data-path 0.2 {folder}/data/text_text_document 0.8 {folder}/data/sums_text_document",
        ),
        (
            "See the commands that H100 nodes would run.",
            "bash scripts/CPT/InfiR2_CPT_FP8_7B.sh --dry-run",
            "bash scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh --dry-run",
            "bash scripts/RL/InfiR2_RL_FP8_7B_stage1_4node.sh --dry-run",
        ),
    ]
    following = "\n\n".join(f"{text}\n\n{md.block(commands)}" for text, *commands in steps)
    return f"""## Where everything is

In {md.code(str(run.folder))}:

{md.table(["files", "what"], rows)}

## Next

{following}

Read `docs/CPT.md`, `docs/SFT.md`, `docs/RL.md` and `docs/EVAL.md`.
"""


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the folder of scripts/quickstart.sh")
    parser.add_argument("--output", type=Path, required=True, help="the .html to write; beside it .md and .png")
    options = parser.parse_args()
    output = options.output
    curves, tuning = output.with_suffix(".png"), output.with_name(f"{output.stem}_fine_tuning.png")
    try:
        run = read_quickstart(options.quickstart)
        parts = [
            *(opening(run), fine_tuning.accuracies(run), comparison(run), limits()),
            *(pretraining.section(run, curves.name), fine_tuning.section(run, tuning.name), evaluation(run)),
            *(provenance.section(run), following(run)),
        ]
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = "\n".join(parts)
    panels = {curves.name: pretraining.panels(run), tuning.name: fine_tuning.panels(run)}
    for name, drawn in panels.items():
        figures.png(drawn, output.with_name(name))
    write(output.with_suffix(".md"), text)
    write(output, page.render(text, panels))
    print(f"{output}: the report; {output.with_suffix('.md').name} has the same text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
