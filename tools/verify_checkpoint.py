#!/usr/bin/env python3
"""Compare two checkpoints of the same model: torch_dist, Hugging Face BF16, Hugging Face block FP8, in any pairing.

  python tools/verify_checkpoint.py exp/InfiR2_CPT_FP8_7B/checkpoints models/InfiR2-7B
  python tools/verify_checkpoint.py models/InfiR2-7B models/InfiR2-7B-FP8 --json report.json

Unquantised against unquantised must be equal bit for bit (by value where the dtypes differ). FP8 against unquantised
must be the rounding of it: every element within half a step of E4M3's grid, every 128x128 block within a relative
error of 0.0626, which correct scales guarantee. FP8 against FP8 must be equal, codes and scales.

Prints a line for each tensor that is not equal (--all: for each) and the verdict. Exit status: 0 equal or within the
bound, 1 different, 2 something cannot be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and its threads spin while they start

from tools.checkpoint import cli  # noqa: E402
from tools.checkpoint.compare import BLOCK_BOUND, Result, compare, names  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402
from tools.checkpoint.parallel import for_each  # noqa: E402
from tools.checkpoint.sources import Source, describe, open_source  # noqa: E402

DIFFERENT, TROUBLE = 1, 2


def parse(argv: Sequence[str] | None) -> Any:
    options = cli.parser(__doc__)
    options.add_argument("a", type=Path, metavar="A", help="a checkpoint")
    options.add_argument("b", type=Path, metavar="B", help="the other one")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the whole comparison there")
    options.add_argument("--all", action="store_true", help="print equal tensors as well")
    options.add_argument(
        "--bound",
        type=float,
        default=BLOCK_BOUND,
        metavar="E",
        help="largest relative error of an FP8 block (default: %(default)s)",
    )
    cli.add_threads_option(options)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        a, b = open_source(options.a, stack), open_source(options.b, stack)
        print(f"A: {options.a}: {a.kind}, {len(a.tensors)} tensors\nB: {options.b}: {b.kind}, {len(b.tensors)} tensors")
        results = compare_all(a, b, options)
        for note in a.notes + b.notes:
            print(f"note: {note}")
        read = sum(info.nbytes for source in (a, b) for info in source.tensors.values())
        both = {"a": describe(a, options.a), "b": describe(b, options.b), "notes": a.notes + b.notes}
    verdict = overall(results)
    print(table(results, everything=options.all), end="")
    print(f"verdict: {verdict}")
    if options.json:
        write_json(options.json, {**both, "verdict": verdict, "bound": options.bound}, results)
    print(cli.summary("compared", read, 0, time.monotonic() - started))
    return DIFFERENT if verdict.startswith("different") else 0


def compare_all(a: Source, b: Source, options: Any) -> list[Result]:
    order = names(a, b)
    total = sum(info.nbytes for source in (a, b) for info in source.tensors.values())
    progress = cli.Progress(total, "comparing")
    found: dict[str, Result] = {}

    def work(name: str) -> None:
        found[name] = compare(a, b, name, options.bound)
        progress.add(sum(source.tensors[name].nbytes for source in (a, b) if name in source.tensors))

    try:
        for_each(order, work, options.threads)
    finally:
        progress.close()
    return [found[name] for name in order]


def overall(results: list[Result]) -> str:
    """The verdict in words, with the numbers behind it."""
    counts = Counter(result.verdict for result in results)
    bad = sum(not result.good for result in results)
    if bad:
        first = next(result.name for result in results if not result.good)
        return f"different: {bad} of {len(results)} tensors, the first is {first}"
    bounded = [result for result in results if result.verdict == "within bound"]
    if not bounded:
        return f"equal: {len(results)} tensors, bit for bit"
    snr = [result.snr_db for result in bounded if result.snr_db is not None]
    worst = f", SNR {min(snr):.1f} dB or better" if snr else ""
    return f"within the FP8 bound: {counts['equal']} tensors equal, {len(bounded)} rounded{worst}"


def table(results: list[Result], *, everything: bool) -> str:
    """Lines of aligned columns, none where all is equal."""
    shown = [result for result in results if everything or result.verdict != "equal"]
    if not shown:
        return ""
    rows = [("tensor", "A", "B", "verdict", "rel. error", "SNR dB", "worst block", "note")]
    for result in shown:
        block = result.worst_block
        rows.append(
            (
                result.name,
                result.dtype_a or "-",
                result.dtype_b or "-",
                result.verdict,
                f"{result.rel_frobenius:.3g}"
                if result.differing
                else "0"
                if result.dtype_a and result.dtype_b
                else "-",
                f"{result.snr_db:.1f}" if result.snr_db is not None else "-",
                f"{block[2]:.3g} at ({block[0]}, {block[1]})" if block and block[2] else "-",
                result.note or (f"{result.differing} elements differ" if result.verdict == "different" else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def write_json(path: Path, head: dict[str, Any], results: list[Result]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps({**head, "results": [result.json() for result in results]}, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError.of(error, path) from None


if __name__ == "__main__":
    sys.exit(cli.run(main, trouble=TROUBLE))
