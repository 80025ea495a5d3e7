#!/usr/bin/env python3
"""Tokenise jsonl into Megatron's .bin/.idx, byte for byte as the pinned Megatron-LM tools/preprocess_data.py does.

    python training/embedded/preprocess_data.py --input text.jsonl --output-prefix data/text --workers 2 --append-eod \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR

writes data/text_text_document.bin and .idx. Both appear whole, the index last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.embedded.errors import TrainingError  # noqa: E402

BATCH = 512  # documents that the tokenizer's threads share out among themselves


def arguments() -> argparse.Namespace:
    """The flags of the pinned tool that matter without sentence splitting and partitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a .jsonl file, one object a line")
    parser.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys of the text; each gets its own .bin/.idx"
    )
    parser.add_argument("--tokenizer-type", choices=["HuggingFaceTokenizer"], required=True, help="as the pinned tool")
    parser.add_argument("--tokenizer-model", required=True, help="directory of the tokenizer")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's eos")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizer threads")
    parser.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        help="accepted for the pinned tool's command line; a bar is shown",
    )
    return parser.parse_args()


def documents(path: Path, keys: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(bytes of the line, texts by key) of every line. Raises TrainingError naming the first line that is not one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                texts = {key: row[key] for key in keys}
            except (ValueError, KeyError, TypeError, IndexError):
                texts = {}
            if not texts or not all(isinstance(text, str) for text in texts.values()):
                wanted = ", ".join(f'"{key}": text' for key in keys)
                raise TrainingError(
                    f"{path}:{number}: expected an object {{{wanted}}}, "
                    f"found {line[:60].decode(errors='replace').strip()!r}"
                )
            yield len(line), texts


def main() -> int:
    """Returns the exit status."""
    args = arguments()
    # The tokenizer's threads, read once when its library starts.
    os.environ["RAYON_NUM_THREADS"] = str(max(1, args.workers))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        if not args.input.is_file():
            raise TrainingError(f"--input: expected a .jsonl file, found none at {args.input}")
        print(write(args))
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write(args: argparse.Namespace) -> str:
    """Tokenise and write; returns a summary line."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from torch import tensor
    from tqdm import tqdm

    from training.embedded.data import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(args.tokenizer_model)
    final = {key: f"{args.output_prefix}_{key}_document" for key in args.json_keys}
    partial = {key: f"{prefix}.partial" for key, prefix in final.items()}
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    counts = {"documents": 0, "tokens": 0}
    try:
        builders = {key: IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for key, prefix in partial.items()}
        rows = documents(args.input, args.json_keys)
        with tqdm(
            total=args.input.stat().st_size,
            unit="B",
            unit_scale=True,
            desc="tokenising",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            while batch := list(itertools.islice(rows, BATCH)):
                for key, builder in builders.items():
                    for ids in tokenizer.tokenizer([texts[key] for _, texts in batch]).input_ids:
                        # An empty document gets no end mark, as upstream.
                        ids = ids + [tokenizer.eod] if ids and args.append_eod else ids
                        builder.add_document(tensor(ids), [len(ids)] if ids else [])
                        counts["tokens"] += len(ids)
                counts["documents"] += len(batch)
                bar.update(sum(size for size, _ in batch))
        for key, builder in builders.items():
            builder.finalize(f"{partial[key]}.idx")
        for key, prefix in final.items():
            for suffix in (".bin", ".idx"):
                os.replace(partial[key] + suffix, prefix + suffix)
    finally:
        for prefix in partial.values():
            for suffix in (".bin", ".idx"):
                Path(prefix + suffix).unlink(missing_ok=True)
    return f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"


if __name__ == "__main__":
    sys.exit(main())
