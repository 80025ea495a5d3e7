#!/usr/bin/env python3
"""Convert Hugging Face safetensors of a dense Qwen2 to a Megatron torch_dist checkpoint.

  python tools/convert_hf_to_torch_dist.py --input-dir models/qwen2.5-7B --output-dir models/qwen2.5-7B_torch_dist

The output is a `release` checkpoint, weights without optimizer, that the pinned Megatron-LM and slime start from:
--pretrained-checkpoint (INIT_CHECKPOINT of the CPT recipes), --load with --finetune, --ref-load (REF_LOAD of SFT and
RL). It loads at every tensor and pipeline parallel size; --tensor-model-parallel-size only cuts the stored chunks so
that each rank of a run of that size reads its own.

Vocabulary rows: as many as vocab_size of config.json. With --make-vocab-size-divisible-by N they are padded, as
Megatron pads them, to a multiple of N times the tensor parallel size. Padding rows are zeros: the logits of real
tokens stay the same, but Megatron's loss is a softmax over all rows, so every padding row adds exp(0) to its
denominator.

Needs no Megatron, CUDA or torch; memory does not grow with the model. The output appears whole or not at all; after an
interruption the same command with --resume goes on.
"""

from __future__ import annotations

import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and its threads spin while they start

import numpy as np  # noqa: E402

from tools.checkpoint import cli, torch_dist, torch_dist_writer  # noqa: E402
from tools.checkpoint.crc import combine  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402
from tools.checkpoint.parallel import bands, buffer, for_each  # noqa: E402
from tools.checkpoint.qwen2_config import check_tensor_parallel, megatron_args, read_config, shape_of  # noqa: E402
from tools.checkpoint.qwen2_layout import LAYERS, Qwen2Shape, Row, extra_state_keys, table  # noqa: E402
from tools.checkpoint.safetensors_io import DTYPES, ITEMSIZE, Entry, HfReader  # noqa: E402
from tools.checkpoint.staging import Range, Staging  # noqa: E402
from tools.checkpoint.torch_archive import Array  # noqa: E402
from tools.checkpoint.torch_dist_writer import SHARD, Layout, Slot  # noqa: E402

RELEASE = "release"
COLUMN_SPLIT = (f"{LAYERS}self_attention.linear_proj.weight", f"{LAYERS}mlp.linear_fc2.weight")
GATE_AND_UP = f"{LAYERS}mlp.linear_fc1.weight"
VOCABULARY_CHUNK = 64 << 20  # a large table in several chunks: several threads write it


def parse(argv: Sequence[str] | None) -> Any:
    options = cli.parser(__doc__)
    options.add_argument("--input-dir", type=Path, required=True, metavar="HF", help="Hugging Face directory")
    options.add_argument("--output-dir", type=Path, required=True, metavar="CKPT", help="checkpoint root to make")
    options.add_argument(
        "--tensor-model-parallel-size", type=cli.positive, default=1, metavar="T", help="cut chunks for T ranks (1)"
    )
    options.add_argument(
        "--make-vocab-size-divisible-by",
        type=cli.positive,
        metavar="N",
        help="pad the vocabulary to a multiple of N * T with rows of zeros (default: no padding)",
    )
    cli.add_output_options(options)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started = time.monotonic()
    path = options.input_dir / "config.json"
    config = read_config(options.input_dir)
    if "quantization_config" in config:
        raise CheckpointError(f"{path}: the weights are quantised, expected the BF16 checkpoint they were cast from")
    with HfReader(options.input_dir) as source:
        shape, note = shape_to_write(config, path, options)
        check_tensors(source, shape, config["vocab_size"])
        layout = Layout(options.output_dir / RELEASE)
        units = list(plan(source, shape, options.tensor_model_parallel_size, layout))
        objects = [
            layout.add_object(key, Array("uint8", (0,), np.empty(0, np.uint8))) for key in extra_state_keys(shape)
        ]
        print(f"{options.input_dir} -> {options.output_dir}: {shape.layers} layers, hidden {shape.hidden}, {note}")
        args = megatron_args(
            config, path, vocab_rows=shape.vocab_rows, tensor_parallel=options.tensor_model_parallel_size
        )
        args.make_vocab_size_divisible_by = options.make_vocab_size_divisible_by or 1
        files = {
            ".metadata": layout.metadata(),
            "common.pt": torch_dist_writer.common_bytes({"args": args, "iteration": 0}, options.output_dir),
            "metadata.json": torch_dist_writer.format_bytes(),
        }
        with Staging(
            options.output_dir,
            job={"tool": "hf_to_torch_dist", "from": source.sources(), "to": zlib.crc32(files[".metadata"])},
            size=layout.size,
            inputs=(options.input_dir,),
            force=options.force,
            resume=options.resume,
            fsync=options.fsync,
        ) as out:
            shard = f"{RELEASE}/{SHARD}"
            out.create(shard, layout.size)
            for slot in objects:
                for position, piece in slot.archive.pieces():
                    out.write(shard, slot.start + position, memoryview(piece))
            write_weights(source, units, out, shard, options.threads)
            for name, content in files.items():
                out.write_bytes(f"{RELEASE}/{name}", content)
            out.write_text(torch_dist.TRACKER, RELEASE)
            out.publish()
        read = sum(unit.nbytes for unit in units)
    print(cli.summary(str(options.output_dir), read, layout.size, time.monotonic() - started))
    return 0


# ---------------------------------------------------------------- plan


def shape_to_write(config: dict[str, Any], path: Path, options: Any) -> tuple[Qwen2Shape, str]:
    """The model with its padded vocabulary, and what to say about it."""
    shape, size = shape_of(config, path), options.tensor_model_parallel_size
    check_tensor_parallel(shape, size, path)
    vocabulary = shape.vocab_rows
    if options.make_vocab_size_divisible_by:
        multiple = options.make_vocab_size_divisible_by * size
        rows = math.ceil(vocabulary / multiple) * multiple
        if rows >= 2**31:
            raise CheckpointError(f"--make-vocab-size-divisible-by: {rows} vocabulary rows are too many")
        shape = replace(shape, vocab_rows=rows)
    elif vocabulary % size:
        raise CheckpointError(
            f"{path}: vocab_size {vocabulary} cannot be split over tensor parallel {size}; "
            "--make-vocab-size-divisible-by pads it"
        )
    padding = shape.vocab_rows - vocabulary
    note = f"{vocabulary} vocabulary rows" + (f" and {padding} padding rows of zeros" if padding else "")
    return shape, note


def check_tensors(source: HfReader, shape: Qwen2Shape, vocabulary: int) -> None:
    """Raise CheckpointError unless the directory holds exactly the tensors of `shape`, of the right shapes."""
    known: set[str] = set()
    for row in table(replace(shape, vocab_rows=vocabulary)):
        dtypes = set()
        for part in row.parts:
            entry = source.entry(part.name)
            known.add(part.name)
            expected = (sum(stop - start for start, stop in part.runs), *row.shape[1:])
            where = f"{source.directory / entry.file}: {part.name}"
            if entry.shape != expected:
                raise CheckpointError(f"{where}: shape {entry.shape}, expected {expected} from config.json")
            if DTYPES[entry.dtype] not in torch_dist.MODEL_DTYPES:
                raise CheckpointError(f"{where}: dtype {entry.dtype}, expected BF16, F16 or F32")
            dtypes.add(entry.dtype)
        if len(dtypes) > 1:
            raise CheckpointError(f"{source.directory}: {row.parts[0].name}: its q, k, v or gate, up differ in dtype")
    for name, entry in source.tensors.items():
        if name in known:
            continue
        if name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq"):
            print(f"note: {name} is left out, the model computes it")
        else:
            raise CheckpointError(f"{source.directory / entry.file}: {name} is not a tensor of this Qwen2")


@dataclass(frozen=True)
class Segment:
    """Rows [first, first + count) of a Hugging Face tensor; rows of zeros where `entry` is None."""

    entry: Entry | None
    first: int
    count: int


@dataclass(frozen=True)
class Unit:
    """Chunks that are filled together: the rows of `segments`, cut into equal column strips, one for each slot."""

    name: str
    slots: tuple[Slot, ...]
    segments: tuple[Segment, ...]
    columns: int  # elements of a row
    itemsize: int

    @property
    def nbytes(self) -> int:
        return sum(segment.count for segment in self.segments) * self.columns * self.itemsize


def plan(source: HfReader, shape: Qwen2Shape, ranks: int, layout: Layout) -> Iterator[Unit]:
    """Cut every Megatron tensor into the chunks that `ranks` tensor parallel ranks own, and place them in `layout`."""
    for row in table(shape):
        dtype = source.entry(row.parts[0].name).dtype
        lead = () if row.layer is None else (row.layer,)
        full = row.shape if row.layer is None else (shape.layers, *row.shape)
        columns = math.prod(row.shape[1:])
        strips = ranks if row.key in COLUMN_SPLIT else 1

        for start, stop in _row_cuts(row, ranks, columns * ITEMSIZE[dtype]):
            slots = []
            for strip in range(strips):
                size = (stop - start, row.shape[1] // strips) if len(row.shape) == 2 else (stop - start,)
                at = (start, strip * size[1]) if len(row.shape) == 2 else (start,)
                chunk = Array(DTYPES[dtype], (*(1 for _ in lead), *size))
                slots.append(layout.add_tensor(row.key, full, (*lead, *at), chunk))
            segments = tuple(_segments(source, row, start, stop))
            name = f"{row.key}{list(lead)}{start}"
            yield Unit(name, tuple(slots), segments, columns, ITEMSIZE[dtype])


def _row_cuts(row: Row, ranks: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """The row ranges of the chunks of one tensor."""
    rows = row.shape[0]
    if row.is_vocabulary:
        per_rank = rows // ranks
        step = max(1, VOCABULARY_CHUNK // row_bytes)
        for rank in range(ranks):
            for first in range(rank * per_rank, (rank + 1) * per_rank, step):
                yield first, min(first + step, (rank + 1) * per_rank)
        return
    if row.key in COLUMN_SPLIT or "layernorm" in row.key or "layer_norm" in row.key:
        yield 0, rows
        return
    blocks = 2 if row.key == GATE_AND_UP else 1  # all of gate, then all of up: each is cut by itself
    step = rows // blocks // ranks
    for first in range(0, rows, step):
        yield first, first + step


def _segments(source: HfReader, row: Row, start: int, stop: int) -> Iterator[Segment]:
    """Where the Megatron rows [start, stop) come from, in their order."""
    runs = []
    for part in row.parts:
        entry, position = source.entry(part.name), 0
        for first, last in part.runs:
            runs.append((first, last, entry, position))
            position += last - first
    for first, last, entry, position in sorted(runs, key=lambda run: run[0]):
        low, high = max(first, start), min(last, stop)
        stored = max(low, min(high, first + entry.shape[0] - position))  # rows beyond it are padding
        if low < stored:
            yield Segment(entry, position + low - first, stored - low)
        if stored < high:
            yield Segment(None, 0, high - stored)


# ---------------------------------------------------------------- write


def write_weights(source: HfReader, units: list[Unit], out: Staging, shard: str, threads: int) -> None:
    units = sorted(units, key=lambda unit: -unit.nbytes)
    progress = cli.Progress(sum(unit.nbytes for unit in units), "converting")

    def work(unit: Unit) -> None:
        if out.done(unit.name):
            progress.add(unit.nbytes)
            return
        ranges: list[Range] = []
        crcs, written = [0] * len(unit.slots), [0] * len(unit.slots)
        for rows in _rows(source, unit):
            for number, strip in enumerate(np.split(rows, len(unit.slots), axis=1)):
                if len(unit.slots) > 1:
                    held = buffer(strip.size, strip.dtype, "strip").reshape(strip.shape)
                    np.copyto(held, strip)
                    strip = held
                view = memoryview(strip.reshape(-1).view(np.uint8))
                crc, position = zlib.crc32(view), unit.slots[number].payload + written[number]
                out.write(shard, position, view)
                ranges.append((shard, position, len(view), crc))
                crcs[number] = combine(crcs[number], crc, len(view))
                written[number] += len(view)
            progress.add(rows.nbytes)
        for slot, crc in zip(unit.slots, crcs, strict=True):
            for position, piece in slot.archive.frame([crc]):
                out.write(shard, slot.start + position, memoryview(piece))
                ranges.append((shard, slot.start + position, len(piece), zlib.crc32(piece)))
        out.record(unit.name, ranges)

    try:
        for_each(units, work, threads)
    finally:
        progress.close()


def _rows(source: HfReader, unit: Unit) -> Iterator[np.ndarray]:
    """The rows of a unit in order, as (rows, columns) of raw elements, at most a piece at a time."""
    width = unit.columns * unit.itemsize
    element = np.dtype(f"u{unit.itemsize}")
    for segment in unit.segments:
        for first, last in bands(segment.first, segment.first + segment.count, width):
            rows = buffer((last - first) * unit.columns, element).reshape(last - first, unit.columns)
            if segment.entry is None:
                rows.fill(0)
            else:
                source.read_into(segment.entry, first * width, memoryview(rows.reshape(-1).view(np.uint8)))
            yield rows


if __name__ == "__main__":
    sys.exit(cli.run(main))
