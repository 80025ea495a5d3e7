#!/usr/bin/env python3
"""Check a command line against the pinned engine before anything starts.

Reports what the engine would refuse, or worse, silently do:
  - unknown flags, wrong choices, wrong types, missing or surplus values
  - combinations that validation rejects (batch sizes, parallel sizes, schedules, precision, checkpoints)
  - flags that are deprecated or change nothing (errors with --strict)
  - model arguments that differ from the Hugging Face config.json, embedding rows included

One line each on standard error: `error: --flag: what is expected and was found [where that is decided]`.
Exit status: 0 nothing wrong (warnings allowed), 1 at least one error, 2 this command was called wrongly.
Needs Python 3.10 and nothing else: no engine, no GPU.

Examples:
  check.py --program pretrain_gpt --world-size 8 --hf-config ~/Qwen2.5-7B -- "${ARGS[@]}"
  check.py --program pretrain_gpt -- --num-layers 28 --lr 1e-4 ...     one rank, as the embedded engine runs
  check.py --program slime -- "${ARGS[@]}"                             flags, choices and values only
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.contract import hf_model, inert, rules  # noqa: E402
from training.contract.contract import FILES, Problem, load, parse  # noqa: E402
from training.contract.setup import Setup  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", required=True, choices=sorted(FILES), help="whose command line it is")
    parser.add_argument("--world-size", type=int, help="number of GPUs; without it one data parallel rank")
    parser.add_argument("--hf-config", help="config.json, or the directory of the Hugging Face model")
    parser.add_argument(
        "--padded-vocab", action="store_true", help="print the number of embedding rows on standard output"
    )
    parser.add_argument("--strict", action="store_true", help="deprecated and inert flags are errors")
    parser.add_argument("argv", nargs="*", metavar="-- ARGV", help="the command line to check")
    return parser


def problems_of(
    program: str,
    argv: Sequence[str],
    *,
    world_size: int | None = None,
    hf_config: str | None = None,
    strict: bool = False,
) -> list[Problem]:
    """Every problem of one command line.  The later checks wait until the flags themselves are right."""
    contract = load(program)
    args, _, problems = parse(contract, argv)
    if problems or program != "pretrain_gpt":
        return problems
    setup = Setup(args, world_size, dict(os.environ))
    problems = rules.check(setup)
    problems += inert.check(contract, argv, setup, strict)
    if hf_config is not None and not rules.incomplete(setup):
        problems += _model_problems(setup, hf_config)
    return problems


def _model_problems(setup: Setup, path: str) -> list[Problem]:
    try:
        config = hf_model.read_config(path)
        return hf_model.check(setup, config, path) + hf_model.check_vocab(setup, config, path)
    except hf_model.ModelError as error:
        return [Problem("error", "--hf-config", str(error))]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = words, []
    if "--" in words:
        cut = words.index("--")
        own, command = words[:cut], words[cut + 1 :]
    options = build_parser().parse_args(own)
    command = [*options.argv, *command]
    problems = problems_of(
        options.program,
        command,
        world_size=options.world_size,
        hf_config=options.hf_config,
        strict=options.strict,
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    failed = any(problem.level == "error" for problem in problems)
    if options.padded_vocab and not failed:
        args, _, _ = parse(load(options.program), command)
        count = hf_model.rows(Setup(args, options.world_size))
        print("unknown" if count is None else count)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
