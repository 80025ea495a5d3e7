#!/usr/bin/env python3
"""Exact-match accuracy of Hugging Face checkpoints, BF16 or block FP8, on held-out prompts: greedy and sampled.

    python training/embedded/quickstart/accuracy.py --checkpoint exp/quickstart/sft2_hf --data held_out.jsonl \\
        --output exp/quickstart/accuracy/sft2.json

Answers are judged by the rule that RL rewards by. Intervals are at 95 %: Wilson's for greedy decoding, and for samples
the normal one over the means of the questions, since samples of one question are not independent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

from tools.checkpoint import cli  # noqa: E402
from tools.checkpoint.block_fp8 import WEIGHT_BLOCK, BlockFP8  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402
from tools.data import chat  # noqa: E402
from tools.data.check import Rules  # noqa: E402
from training.embedded import generation, rewards, rollout  # noqa: E402
from training.embedded.errors import TrainingError  # noqa: E402

Z = 1.959964  # of a 95 % interval


def read_weights(directory: Path) -> rollout.Weights:
    """Every tensor of a Hugging Face checkpoint; an FP8 matrix together with its scales."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise TrainingError(f"{file}: expected a .safetensors file, found: {error}") from error
    if not tensors:
        raise TrainingError(f"{directory}: expected .safetensors files, found none")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    return {
        name: BlockFP8(tensor.view(torch.uint8), scales[f"{name}_scale_inv"], WEIGHT_BLOCK)
        if f"{name}_scale_inv" in scales
        else tensor
        for name, tensor in tensors.items()
    }


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The interval of a share of independent trials, within 0 and 1."""
    share, spread = correct / total, Z * Z / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def of_means(means: list[float]) -> tuple[float, float]:
    """The interval of the mean over questions; Wilson's where all questions agree and nothing can be estimated."""
    mean = statistics.fmean(means)
    if len(set(means)) == 1:
        return wilson(mean * len(means), len(means))
    half = Z * statistics.stdev(means) / math.sqrt(len(means))
    return max(0.0, mean - half), min(1.0, mean + half)


def measure(checkpoint: Path, output: Path, options: argparse.Namespace) -> dict:
    """The content of the output file of a checkpoint."""
    tokenizer = chat.load_tokenizer(str(checkpoint))
    engine = rollout.Engine(str(checkpoint), tokenizer)
    engine.load(read_weights(checkpoint))
    rules = Rules("rl", "prompt", "label", apply_chat_template=True, rm_type=options.rm_type)
    rows = rollout.read(str(options.data), rules)
    prompts = chat.encode_prompts(tokenizer, [row["prompt"] for row in rows], True)

    def judge(temperature: float, samples: int) -> tuple[list[float], float]:
        sampling = generation.Sampling(temperature, max_new_tokens=options.max_new_tokens, stop=engine.stop)
        together = max(1, options.batch // samples)
        means, lengths = [], []
        for start in range(0, len(rows), together):
            print(f"{output.stem}: temperature {temperature:g}, {start} of {len(rows)} questions", flush=True)
            part = [prompt for prompt in prompts[start : start + together] for _ in range(samples)]
            seed = generation.seed_of(options.seed, temperature, start)
            drawn = generation.generate(engine.model, part, sampling, seed)
            lengths += [len(response.tokens) for response in drawn]
            texts = [tokenizer.decode(response.tokens) for response in drawn]
            for number, row in enumerate(rows[start : start + together]):
                answers = texts[number * samples : (number + 1) * samples]
                right = [rewards.reward(options.rm_type, text, row["label"]) == 1.0 for text in answers]
                means.append(sum(right) / samples)
        return means, statistics.fmean(lengths)

    greedy, greedy_length = judge(0.0, 1)
    sampled, sampled_length = judge(options.temperature, options.samples)
    return {
        "checkpoint": str(checkpoint),
        "format": "FP8" if engine.fp8 else "BF16",
        "questions": len(rows),
        "greedy": {
            "accuracy": statistics.fmean(greedy),
            "interval": wilson(round(sum(greedy)), len(greedy)),
            "tokens": greedy_length,
        },
        "sampled": {
            "accuracy": statistics.fmean(sampled),
            "interval": of_means(sampled),
            "tokens": sampled_length,
            "samples": options.samples,
            "temperature": options.temperature,
        },
    }


def write(result: dict, output: Path) -> None:
    """The file, whole, and what it says."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, output)
    for kind in ("greedy", "sampled"):
        low, high = result[kind]["interval"]
        print(
            f"{output.stem}: {kind} accuracy {result[kind]['accuracy']:.1%} ({low:.1%} to {high:.1%}), "
            f"{result[kind]['tokens']:.1f} tokens",
            flush=True,
        )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True, metavar="DIR", help="Hugging Face directories"
    )
    parser.add_argument("--data", type=Path, required=True, help=".jsonl with prompt (messages) and label")
    parser.add_argument(
        "--output", type=Path, nargs="+", required=True, metavar="FILE", help="the .json file to write for each"
    )
    parser.add_argument("--rm-type", default="deepscaler", help="the rule (default: %(default)s)")
    parser.add_argument("--samples", type=cli.positive, default=4, help="per question (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=cli.positive, default=64, help="of a response (default: %(default)s)")
    parser.add_argument("--batch", type=cli.positive, default=256, help="responses at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the samples (default: %(default)s)")
    options = parser.parse_args()
    if len(options.output) != len(options.checkpoint):
        found = len(options.output)
        parser.error(f"--output: expected {len(options.checkpoint)}, one for each checkpoint, found {found}")
    try:
        rewards.reward(options.rm_type, "", "")
    except ValueError as error:
        parser.error(str(error))
    for checkpoint, output in zip(options.checkpoint, options.output, strict=True):
        try:
            result = measure(checkpoint, output, options)
        except (TrainingError, CheckpointError) as error:
            print(error, file=sys.stderr)
            return 1
        write(result, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
