#!/usr/bin/env python3
r"""Convert public SFT and RL data into the .jsonl or .parquet that slime reads.

  python tools/prepare_data.py --format infialign --input InfiAlign-SFT-72k/*.parquet --output data/stage1.jsonl
  python tools/prepare_data.py --format dapo-math --input dapo-math-17k.parquet --output data/dapo-math-17k.jsonl

SFT, into {"messages": [{"role", "content"}, ...]}:
  infialign      each row as one of the next three, by its keys
  messages       "messages" with role and content
  sharegpt       "conversations" with from (human, gpt, system) and value
  alpaca         "instruction", "input", "output", "system", "history"
RL, into {"prompt": [{"role", "content"}], "label"}:
  dapo-math      "prompt", "reward_model": {"ground_truth"}; each question once
  prompt-label   "prompt" (text or messages) and "label"

Inputs are .jsonl, .parquet, or .json with one list. Rows keep their order. A row that is no valid sample is an error
that names its line, or with --drop-invalid is left out and counted; everything else that is changed or left out is
counted, too. An output that is there is left alone: it is either the same, and there is nothing to do, or an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.checkpoint import cli  # noqa: E402
from tools.data.convert import RL, SFT, Job, Tally, convert  # noqa: E402
from tools.data.errors import DataError  # noqa: E402
from tools.data.options import parser  # noqa: E402
from tools.data.rows import TRAINABLE  # noqa: E402
from tools.data.writer import write_rows  # noqa: E402


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--format", choices=(*SFT, *RL), required=True, help="layout of the input, see above")
    options.add_argument(
        "--input", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="joined in this order"
    )
    options.add_argument("--output", type=Path, required=True, metavar="FILE", help=".jsonl or .parquet")
    options.add_argument(
        "--instruction",
        choices=("boxed", "keep"),
        default="boxed",
        help=r"(dapo-math) 'Answer: $Answer' becomes 'Answer: \boxed{$Answer}', as --rm-type deepscaler and math want "
        "it and slime's own copy of the data has it; or stays, as --rm-type dapo wants it (default: boxed)",
    )
    options.add_argument("--prompt-key", default="prompt", metavar="KEY", help="(prompt-label) default: prompt")
    options.add_argument("--label-key", default="label", metavar="KEY", help="(prompt-label) default: label")
    options.add_argument("--drop-invalid", action="store_true", help="leave invalid rows out, and count them")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output
    if output.suffix not in TRAINABLE:
        raise DataError(f"--output {output}: expected a name that ends in {' or '.join(TRAINABLE)}")
    if any(output.exists() and path.exists() and output.samefile(path) for path in options.input):
        raise DataError(f"--output {output}: expected another file than --input")
    job = Job(
        inputs=tuple(options.input),
        format=options.format,
        instruction=options.instruction,
        prompt_key=options.prompt_key,
        label_key=options.label_key,
        drop_invalid=options.drop_invalid,
    )
    tally = Tally()
    written = write_rows(convert(job, tally), output, job.key)
    print(f"{output}: {'written' if written else 'nothing to do, it holds these rows already'}")
    print("\n".join(tally.lines(job)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
