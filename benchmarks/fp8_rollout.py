#!/usr/bin/env python3
"""RL on FP8 rollouts, with and without truncated importance sampling, beside RL on BF16 rollouts.

    .venv/bin/python benchmarks/fp8_rollout.py --data exp/quickstart --output exp/fp8_rollout

Starts the tiny RL recipe from the quickstart's SFT model several times with the same seeds (a finished run is not
repeated), and prints for each how far the rollout engine was from the trainer, and what was learned: the reward of all
samples drawn, first and last rollouts, and its ratio to the run on BF16 rollouts.

Without TIS means a weight of 1 for every token: --tis-clip 1 --tis-clip-low 1, so that its ratio is still logged.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.embedded.quickstart.runs import RL_TAGS, Run, read_run  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
OFF = ["--tis-clip", "1", "--tis-clip-low", "1"]
# Name -> (rollout model of the quickstart, flags); the first is what the others are compared with.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "BF16 rollouts, TIS": ("sft_stage2_hf", []),
    "FP8 rollouts, TIS": ("sft_stage2_fp8", []),
    "FP8 rollouts, no TIS": ("sft_stage2_fp8", OFF),
}


def train(options: argparse.Namespace, seed: int, name: str) -> Run:
    """One run of the tiny recipe."""
    model, flags = VARIANTS[name]
    out = options.output / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    environment = {
        **os.environ,
        "OUT_DIR": str(out),
        "DATA_DIR": str(options.data / "arithmetic" / "rl.jsonl"),
        "EVAL_DATA": str(options.data / "arithmetic" / "validation.jsonl"),
        "REF_LOAD": str(options.data / "sft_stage2"),
        "HF_CHECKPOINT": str(options.data / model),
        "PYTHON": sys.executable,
    }
    command = ["bash", str(REPO / "scripts" / "RL" / "InfiR2_RL_FP8_tiny_stage1.sh"), *flags]
    command += ["--num-rollout", str(options.num_rollout), "--seed", str(seed), "--rollout-seed", str(seed)]
    print(f"seed {seed}, {name}", flush=True)
    result = subprocess.run([*command, *options.flags], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{out}: the run failed: {result.stderr.strip().splitlines()[-1]}")
    return read_run(out, RL_TAGS)


def row(name: str, seed: int, run: Run, reference: Run) -> str:
    """A line of the table. Reward: means of the first and of the last tenth of the rollouts, at least one."""

    def ends(of: Run) -> tuple[float, float]:
        reward = of.values("rollout/raw_reward_drawn")
        part = max(1, len(reward) // 10)
        return float(reward[:part].mean()), float(reward[-part:].mean())

    first, last = ends(run)
    error, kl = run.values("rollout/mult_prob_error"), run.values("rollout/kl_to_trainer")
    ratio = last / max(ends(reference)[1], 1e-9)
    return (
        f"| {seed} | {name} | {error.mean():.5f} | {error.max():.5f} | {kl.mean():.2e} "
        f"| {run.values('train/tis').mean():.5f} | {first:.3f} | {last:.3f} | {ratio:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of scripts/quickstart.sh")
    parser.add_argument("--output", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--num-rollout", type=int, default=50, help="of each run (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags for the recipe, after --")
    options = parser.parse_args()
    options.data, options.output = options.data.resolve(), options.output.resolve()
    rows = []
    for seed in options.seeds:
        runs = {name: train(options, seed, name) for name in VARIANTS}
        rows += [row(name, seed, run, runs[next(iter(VARIANTS))]) for name, run in runs.items()]
    print(
        "| seed | run | mult. prob. error, mean | max | KL | TIS ratio, mean | reward, first | last | last / BF16 |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
