#!/usr/bin/env python3
"""How far FP8 training is from BF16, beside how far BF16 runs with different seeds are from one another.

    .venv/bin/python benchmarks/fp8_gap.py --data exp/quickstart --output exp/fp8_gap

Trains the tiny recipe with every seed in both precisions on the quickstart's data (a finished run is not repeated) and
prints a table. The held-out loss is over the whole test split, so that it is the same text whatever the seed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.embedded.quickstart.runs import Run, read_run, relative_gap  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
LAST = 50  # iterations of the "last" training loss
TEST_BATCHES = 145  # of 8 x 128 tokens: the test split of the quickstart's corpus


def train(options: argparse.Namespace, seed: int, precision: str) -> Run:
    """One run of the tiny recipe."""
    out = options.output / f"{precision}_{seed}"
    environment = {
        **os.environ,
        "PRECISION": precision,
        "OUT_DIR": str(out),
        "DATA_PATH": str(options.data / "data" / "text_text_document"),
        "TOKENIZER_MODEL": str(options.data / "tokenizer"),
        "PYTHON": sys.executable,
    }
    command = ["bash", str(REPO / "scripts" / "CPT" / "InfiR2_CPT_FP8_tiny.sh"), "--from-scratch", "--seed", str(seed)]
    command += ["--train-iters", str(options.train_iters), "--eval-iters", str(TEST_BATCHES)]
    command += [
        "--eval-interval",
        str(options.train_iters),
        "--save-interval",
        str(options.train_iters),
        *options.flags,
    ]
    print(f"seed {seed}, {precision}", flush=True)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_run(out)


def held_out(run: Run) -> float:
    return float(run.values("lm loss test")[-1])


def rounding(run: Run) -> str:
    """The line that shows that quantisation was active."""
    return next(line for line in run.log.splitlines() if line.startswith("FP8 rounding"))


def spread(values: list[float]) -> float:
    """Mean relative distance between two of the values."""
    pairs = [(a, b) for n, a in enumerate(values) for b in values[:n]]
    return statistics.mean(2 * abs(a - b) / (a + b) for a, b in pairs)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of scripts/quickstart.sh")
    parser.add_argument("--output", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1236, 1237, 1238], help="(default: %(default)s)")
    parser.add_argument("--train-iters", type=int, default=400, help="of each run (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags of the recipe, after --")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds: expected at least two, for a distance between them")
    options.data, options.output = options.data.resolve(), options.output.resolve()
    runs = {(s, p): train(options, s, p) for s in options.seeds for p in ("bf16", "fp8")}
    print("\n| seed | held-out BF16 | held-out FP8 | gap | training loss gap, mean | last 50 | mean size per step |")
    print("|---|---|---|---|---|---|---|")
    gaps = []
    for seed in options.seeds:
        bf16, fp8 = runs[seed, "bf16"], runs[seed, "fp8"]
        a, b = held_out(bf16), held_out(fp8)
        _, steps = relative_gap(fp8, bf16)
        gaps.append((b - a) / a)
        print(
            f"| {seed} | {a:.4f} | {b:.4f} | {gaps[-1]:+.2%} | {steps.mean():+.2%} | {steps[-LAST:].mean():+.2%} "
            f"| {abs(steps).mean():.2%} |"
        )
    seeds = spread([held_out(runs[seed, "bf16"]) for seed in options.seeds])
    size = statistics.mean(map(abs, gaps))
    print(f"\nFP8 against BF16, same seed: held-out loss {size:.2%} apart on average.")
    print(f"BF16 against BF16, another seed: {seeds:.2%} apart on average; ratio {size / seeds:.2f}.")
    print(rounding(runs[options.seeds[0], "fp8"]))


if __name__ == "__main__":
    main()
