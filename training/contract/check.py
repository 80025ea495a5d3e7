#!/usr/bin/env python3
"""Check a command line against the pinned engine before anything starts.

Reports what the engine would refuse, or worse, silently do:
  - unknown flags, wrong choices, wrong types, missing or surplus values
  - combinations that validation rejects (batch sizes, parallel sizes, schedules, precision, checkpoints)
  - flags that are deprecated or change nothing (errors with --strict)
  - model arguments that differ from the Hugging Face config.json, embedding rows included
  - slime: what its engines cannot do with the Hugging Face checkpoint (vocabulary, FP8 blocks and scales, context),
    and a start or resume that does not fit the checkpoint in --load, where that can be seen from here

One line each on standard error: `error: --flag: what is expected and was found [where that is decided]`.
Exit status: 0 nothing wrong (warnings allowed), 1 at least one error, 2 this command was called wrongly.
Needs Python 3.10 and nothing else: no engine, no GPU.

Examples:
  check.py --program pretrain_gpt --world-size 8 --hf-config models/qwen2.5-7B -- "${ARGS[@]}"
  check.py --program pretrain_gpt -- --num-layers 28 --lr 1e-4 ...     one rank, as the embedded engine runs
  check.py --program slime --hf-config "$HF_CHECKPOINT" --scale-format fp32 -- "${ARGS[@]}"
  check.py --program slime --hf-config "$HF_CHECKPOINT" --print-scale-format     pow2, fp32 or bf16

slime's ARGS are what follows train.py (or begin with train_async.py, to check that entrypoint). The trainer's GPUs are
in them; --world-size, where given, is the size of the Ray cluster that must hold trainer and engines.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.contract import fp8_scales, hf_model, inert, rules, slime_inert, slime_model, slime_rules  # noqa: E402
from training.contract.contract import FILES, Problem, load, parse  # noqa: E402
from training.contract.setup import Setup, SlimeSetup  # noqa: E402

ENTRYPOINTS = ("train.py", "train_async.py")  # slime's


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", required=True, choices=sorted(FILES), help="whose command line it is")
    parser.add_argument(
        "--world-size", type=int, help="number of GPUs; without it one data parallel rank (slime: see above)"
    )
    parser.add_argument("--hf-config", help="config.json, or the directory of the Hugging Face model")
    parser.add_argument(
        "--padded-vocab", action="store_true", help="print the number of embedding rows on standard output"
    )
    parser.add_argument(
        "--scale-format",
        choices=fp8_scales.FORMATS,
        help="slime: the trainer's FP8 scales, which the checkpoint of --hf-config must have as well",
    )
    parser.add_argument(
        "--print-scale-format",
        action="store_true",
        help="print the scales of the checkpoint of --hf-config on standard output: pow2, fp32, or bf16 (no FP8)",
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
    scale_format: str | None = None,
    strict: bool = False,
) -> list[Problem]:
    """Every problem of one command line.  The later checks wait until the flags themselves are right."""
    contract = load(program)
    entrypoint, argv = split_entrypoint(program, argv)
    args, _, problems = parse(contract, argv)
    if problems:
        return problems
    env = dict(os.environ)
    if program == "slime":
        slime = SlimeSetup.of(args, env, entrypoint)
        problems = slime_rules.check(slime)
        if not slime_rules.incomplete(slime):
            problems += slime_rules.fits(slime, world_size) if world_size is not None else []
            problems += inert.check(contract, argv, slime, strict, slime_inert.TABLE)
            problems += _checkpoint_problems(slime, hf_config, scale_format) if hf_config is not None else []
        return problems
    setup = Setup(args, world_size, env)
    problems = rules.check(setup)
    problems += inert.check(contract, argv, setup, strict)
    if hf_config is not None and not rules.incomplete(setup):
        problems += _model_problems(setup, hf_config)
    return problems


def split_entrypoint(program: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """slime's entrypoint, train.py unless argv begins with another, and the flags."""
    words = list(argv)
    if program == "slime" and words and Path(words[0]).name in ENTRYPOINTS:
        return Path(words[0]).name, words[1:]
    return ENTRYPOINTS[0], words


def _model_problems(setup: Setup, path: str) -> list[Problem]:
    try:
        config = hf_model.read_config(path)
        return hf_model.check(setup, config, path) + hf_model.check_vocab(setup, config, path)
    except hf_model.ModelError as error:
        return [Problem("error", "--hf-config", str(error))]


def _checkpoint_problems(setup: SlimeSetup, path: str, scale_format: str | None) -> list[Problem]:
    try:
        problems = slime_model.check(setup, hf_model.read_config(path), path)
        if scale_format is not None and not setup.train_only:
            problems += fp8_scales.check(path, scale_format)
        return problems
    except hf_model.ModelError as error:
        return [Problem("error", "--hf-config", str(error))]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = words, []
    if "--" in words:
        cut = words.index("--")
        own, command = words[:cut], words[cut + 1 :]
    parser = build_parser()
    options = parser.parse_args(own)
    if (options.scale_format or options.print_scale_format) and options.hf_config is None:
        parser.error("--scale-format and --print-scale-format need --hf-config")
    if options.scale_format and options.program != "slime":
        parser.error("--scale-format is for --program slime")
    command = [*options.argv, *command]
    failed = False
    if command or not options.print_scale_format:
        failed = report(options, command)
    if options.padded_vocab and not failed:
        count = embedding_rows(options.program, command, options.world_size)
        print("unknown" if count is None else count)
    if options.print_scale_format and not failed:
        try:
            print(fp8_scales.scale_format(options.hf_config))
        except hf_model.ModelError as error:
            print(Problem("error", "--hf-config", str(error)), file=sys.stderr)
            failed = True
    return 1 if failed else 0


def report(options: argparse.Namespace, command: Sequence[str]) -> bool:
    """Print the problems of a command line; whether one is an error."""
    problems = problems_of(
        options.program,
        command,
        world_size=options.world_size,
        hf_config=options.hf_config,
        scale_format=options.scale_format,
        strict=options.strict,
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    return any(problem.level == "error" for problem in problems)


def embedding_rows(program: str, command: Sequence[str], world_size: int | None) -> int | None:
    """Rows of the embedding that a command line without errors builds; None where the tokenizer is not here."""
    args, _, _ = parse(load(program), split_entrypoint(program, command)[1])
    return hf_model.rows(SlimeSetup.of(args, {}).megatron if program == "slime" else Setup(args, world_size))


if __name__ == "__main__":
    sys.exit(main())
