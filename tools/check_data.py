#!/usr/bin/env python3
r"""Check SFT or RL data before a job reads it, and count what follows: tokens, rollouts, optimizer steps.

  python tools/check_data.py --kind sft --data data/stage1.jsonl --tokenizer models/qwen2.5-7B --max-tokens 32768 \
    --rollout-batch-size 64 --global-batch-size 64 --num-epoch 5 --save-interval 1000
  python tools/check_data.py --kind rl --data data/dapo-math-17k.jsonl --apply-chat-template \
    --rollout-batch-size 128 --n-samples-per-prompt 16 --global-batch-size 2048 --num-rollout 10240 --save-interval 20

The flags are slime's, and the rules are what slime does at 8359c9a with a file; the first bad line is named. A row of
SFT is {"messages": [{"role", "content"}, ...]}, one of RL {"prompt", "label"}, the prompt a list of messages with
--apply-chat-template and text without. With --tokenizer every sample is tokenised as slime does it, about 2 MB per
second and core; --cache keeps the result until the file changes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn of every long sample
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tools.checkpoint import cli  # noqa: E402
from tools.data.cache import cached  # noqa: E402
from tools.data.check import Counts, Rules, scan  # noqa: E402
from tools.data.errors import DataError  # noqa: E402
from tools.data.options import parser  # noqa: E402
from tools.data.schedule import Plan, Schedule, schedule  # noqa: E402


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--kind", choices=("sft", "rl"), required=True, help="what the rows are for")
    options.add_argument("--data", type=Path, required=True, metavar="FILE", help=".jsonl or .parquet")
    options.add_argument("--input-key", metavar="KEY", help="default: messages (sft), prompt (rl)")
    options.add_argument("--label-key", default="label", metavar="KEY", help="(rl) default: label")
    options.add_argument("--metadata-key", default="metadata", metavar="KEY", help="default: metadata")
    options.add_argument("--apply-chat-template", action="store_true", help="(rl) prompts are messages")
    options.add_argument(
        "--rm-type", default="deepscaler", metavar="TYPE", help="(rl) whose labels they are; default: deepscaler"
    )
    options.add_argument("--eval", action="store_true", help="held-out prompts: no rollouts and steps follow from them")
    lengths = options.add_argument_group("lengths")
    lengths.add_argument("--tokenizer", type=Path, metavar="DIR", help="Hugging Face directory; without it no lengths")
    lengths.add_argument("--max-tokens", type=cli.positive, metavar="N", help="(sft) of a whole conversation")
    lengths.add_argument("--max-prompt-tokens", type=cli.positive, metavar="N", help="(rl) of a prompt")
    lengths.add_argument("--allow-long", action="store_true", help="longer ones are a warning, not an error")
    lengths.add_argument("--cache", type=Path, metavar="FILE", help="where to keep the result for the next check")
    plan = options.add_argument_group("rollouts and steps")
    plan.add_argument(
        "--rollout-batch-size",
        type=cli.positive,
        metavar="N",
        help="prompts of a rollout; else no count",
    )
    plan.add_argument("--global-batch-size", type=cli.positive, metavar="N", help="samples of an optimizer step")
    plan.add_argument("--n-samples-per-prompt", type=cli.positive, default=1, metavar="N", help="(rl) default: 1")
    plan.add_argument("--num-epoch", type=cli.positive, metavar="E", help="times the data")
    plan.add_argument("--num-rollout", type=cli.positive, metavar="R", help="wins over --num-epoch, as in slime")
    plan.add_argument("--save-interval", type=cli.positive, metavar="N", help="rollouts between checkpoints")
    output = options.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    output.add_argument("--rollouts", action="store_true", help="only '<rollouts> <rollouts per epoch>' on stdout")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    rules = _rules(options)
    plan = _plan(options)
    counts = cached(options.cache, options.data, rules, scan)
    result = schedule(counts.samples, plan, str(options.data)) if plan else None
    for warning in counts.warnings:
        print(f"{Path(sys.argv[0]).name}: warning: {warning}", file=sys.stderr)
    if options.rollouts:
        print(result.rollouts, result.rollouts_per_epoch)
    elif options.json:
        print(json.dumps(_report(options, counts, result)))
    else:
        print("\n".join(_lines(counts, plan, result)))
    return 0


def _rules(options: argparse.Namespace) -> Rules:
    sft = options.kind == "sft"
    if sft and options.apply_chat_template:
        raise DataError("--apply-chat-template: slime's SFT formats messages itself; expected it with --kind rl only")
    if sft and options.eval:
        raise DataError("--eval: slime evaluates prompts; expected it with --kind rl only")
    wrong = options.max_prompt_tokens if sft else options.max_tokens
    if wrong:
        flags = ("--max-prompt-tokens", "--max-tokens")
        raise DataError(f"{flags[not sft]}: expected {flags[sft]} with --kind {options.kind}")
    limit = options.max_tokens or options.max_prompt_tokens
    flag = "--max-tokens" if sft else "--max-prompt-tokens"
    if limit and not options.tokenizer:
        raise DataError(f"{flag}: expected --tokenizer with it")
    return Rules(
        kind=options.kind,
        input_key=options.input_key or ("messages" if sft else "prompt"),
        label_key=options.label_key,
        metadata_key=options.metadata_key,
        apply_chat_template=options.apply_chat_template,
        rm_type=options.rm_type,
        tokenizer=options.tokenizer,
        limit=limit,
        limit_flag=flag,
        allow_long=options.allow_long,
    )


def _plan(options: argparse.Namespace) -> Plan | None:
    if options.rollouts and (options.eval or not options.rollout_batch_size):
        raise DataError("--rollouts: expected --rollout-batch-size with it, and no --eval")
    if options.rollouts and not (options.num_epoch or options.num_rollout):
        raise DataError("--rollouts: expected --num-epoch or --num-rollout with it")
    if options.eval or not options.rollout_batch_size:
        return None
    return Plan(
        rollout_batch_size=options.rollout_batch_size,
        global_batch_size=options.global_batch_size,
        n_samples_per_prompt=options.n_samples_per_prompt,
        num_epoch=options.num_epoch,
        num_rollout=options.num_rollout,
        save_interval=options.save_interval,
    )


def _report(options: argparse.Namespace, counts: Counts, result: Schedule | None) -> dict[str, Any]:
    mean = counts.tokens / counts.samples if counts.tokens is not None else None
    schedule = asdict(result) if result else {}
    return {"file": str(options.data), "kind": options.kind, **counts.as_json(), "mean": mean, **schedule}


def _lines(counts: Counts, plan: Plan | None, result: Schedule | None) -> Iterator[str]:
    yield f"samples: {counts.samples:,}"
    if counts.tokens is not None:
        longest = f"longest {counts.longest:,} in {counts.unit} {counts.longest_at:,}"
        yield f"tokens: {counts.tokens:,}, mean {counts.tokens / counts.samples:,.1f}, {longest}"
    if counts.trained is not None:
        yield f"trained tokens: {counts.trained:,}, {counts.trained / counts.tokens:.1%}"
    if not result:
        return
    per_epoch = f"{result.rollouts_per_epoch:,} rollouts of {plan.rollout_batch_size:,}"
    yield f"samples per epoch: {result.samples_per_epoch:,} in {per_epoch}"
    if result.rollouts:
        yield f"rollouts: {result.rollouts:,}, {result.epochs:,.4g} times through the file"
    if result.optimizer_steps:
        yield f"optimizer steps: {result.optimizer_steps:,} of {plan.global_batch_size:,} samples"


if __name__ == "__main__":
    sys.exit(cli.run(main))
