#!/usr/bin/env python3
"""Convert a Megatron torch_dist checkpoint of a dense Qwen2 to Hugging Face safetensors.

  python tools/convert_torch_dist_to_hf.py \\
    --input-dir exp/InfiR2_CPT_FP8_7B/checkpoints \\
    --output-dir models/InfiR2-7B \\
    --origin-hf-dir models/qwen2.5-7B

--input-dir is the root of the checkpoints (its latest_checkpointed_iteration.txt decides, --ckpt-step overrides it),
one iter_XXXXXXX, or a release directory. Any tensor or pipeline parallel size, with or without the distributed
optimizer.

--origin-hf-dir gives config.json, which is compared with the checkpoint first, and every file beside the weights:
tokenizer, chat template, generation configuration. Its weights are not read and need not be there.

Only the byte ranges of model weights are read, in pieces: memory does not grow with the model, and optimizer states
cost nothing. No pickle is executed, no CUDA, Megatron or torch is needed. The output appears whole or not at all;
after an interruption the same command with --resume goes on.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and its threads spin while they start

import numpy as np  # noqa: E402

from tools.checkpoint import cli, safetensors_io, torch_dist  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402
from tools.checkpoint.parallel import bands, buffer, for_each  # noqa: E402
from tools.checkpoint.qwen2_config import check_args, read_config, shape_of, with_dtype  # noqa: E402
from tools.checkpoint.qwen2_layout import HfTensor, plan_hf  # noqa: E402
from tools.checkpoint.safe_pickle import NUMPY_DTYPES  # noqa: E402
from tools.checkpoint.staging import Staging  # noqa: E402

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def parse(argv: Sequence[str] | None) -> Any:
    options = cli.parser(__doc__)
    options.add_argument("--input-dir", type=Path, required=True, metavar="CKPT", help="torch_dist checkpoint")
    options.add_argument("--output-dir", type=Path, required=True, metavar="OUT", help="directory to make")
    options.add_argument("--origin-hf-dir", type=Path, required=True, metavar="HF", help="config.json, tokenizer, ...")
    options.add_argument("--ckpt-step", type=cli.positive, metavar="N", help="iteration to take from a root")
    options.add_argument(
        "--chunk-size",
        type=cli.positive,
        default=5 << 30,
        metavar="BYTES",
        help="largest weight file; a tensor that is larger gets its own (default: %(default)s)",
    )
    options.add_argument(
        "--vocab-size", type=cli.positive, metavar="N", help="embedding rows to write (default: vocab_size of config)"
    )
    options.add_argument(
        "--pad-vocab", action="store_true", help="where fewer rows are stored than wanted, add rows of zeros"
    )
    options.add_argument("--model-name", metavar="M", help="model family, checked against config.json (qwen2)")
    cli.add_output_options(options)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started = time.monotonic()
    location = torch_dist.resolve(options.input_dir, options.ckpt_step)
    config = read_config(options.origin_hf_dir)
    if options.model_name and not options.model_name.lower().startswith("qwen2"):
        raise CheckpointError(f"--model-name: expected qwen2, found {options.model_name!r}")
    with torch_dist.Reader(location.directory) as reader:
        conversion = plan(reader, config, options)
        print(f"{location.directory} -> {options.output_dir}: {conversion.text}")
        with Staging(
            options.output_dir,
            job=conversion.job(reader, options),
            size=conversion.size,
            inputs=(options.input_dir, location.directory, options.origin_hf_dir),
            force=options.force,
            resume=options.resume,
            fsync=options.fsync,
        ) as out:
            write_weights(reader, conversion, out, options.threads)
            write_rest(conversion, out, options.origin_hf_dir)
            out.publish()
    print(cli.summary(str(options.output_dir), conversion.read, conversion.size, time.monotonic() - started))
    return 0


# ---------------------------------------------------------------- plan


@dataclass(frozen=True)
class Conversion:
    """tensors: what to write. files: their names, dtypes and shapes by file. layouts: where they lie in it."""

    tensors: list[HfTensor]
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]]
    layouts: dict[str, safetensors_io.Plan]
    config: dict[str, Any]
    text: str

    @property
    def size(self) -> int:
        return sum(layout.size for layout in self.layouts.values())

    @property
    def read(self) -> int:
        """Bytes of the rows that are taken from the checkpoint."""
        return sum(row_bytes(t) * sum(stop - start for start, stop in t.runs) for t in self.tensors)

    def job(self, reader: torch_dist.Reader, options: Any) -> dict[str, Any]:
        """What decides the output."""
        sources = []
        for path in sorted(reader.directory.iterdir()):
            status = path.stat()
            sources.append([path.name, status.st_size, status.st_mtime_ns])
        headers = {file: zlib.crc32(layout.header) for file, layout in self.layouts.items()}
        return {"tool": "torch_dist_to_hf", "from": sources, "headers": headers}


def plan(reader: torch_dist.Reader, config: dict[str, Any], options: Any) -> Conversion:
    """Compare the checkpoint with config.json and lay the output out. Raises CheckpointError at a contradiction."""
    path, args_path = options.origin_hf_dir / "config.json", reader.directory / "common.pt"
    args = reader.common().get("args")
    if args is None:
        raise CheckpointError(f"{args_path}: has no args, expected Megatron's arguments")
    check_args(config, path, args, args_path)
    shape = shape_of(config, path)
    wanted = options.vocab_size or shape.vocab_rows
    shape = replace(shape, vocab_rows=wanted)
    note = _vocabulary(reader, wanted, args, options, path)
    tensors = plan_hf(reader, shape, cut_vocab=True, pad_vocab=options.pad_vocab)
    described = [(tensor.name, safetensors_io.NAMES[tensor.dtype], tensor.shape) for tensor in tensors]
    files = safetensors_io.shard(described, options.chunk_size)
    layouts = {file: safetensors_io.plan_file(content) for file, content in files.items()}
    by_dtype: dict[str, int] = {}
    for tensor in tensors:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + row_bytes(tensor) * tensor.shape[0]
    dtype = max(by_dtype, key=by_dtype.__getitem__)
    changed = with_dtype(config, dtype) | {"vocab_size": wanted}
    tied = "tied" if shape.tied else "untied"
    text = f"{shape.layers} layers, hidden {shape.hidden}, {tied}, {dtype}, {note}"
    return Conversion(tensors, files, layouts, changed, text)


def _vocabulary(reader: torch_dist.Reader, wanted: int, args: Any, options: Any, path: Path) -> str:
    """What becomes of the vocabulary rows, in words. Neither too few nor too many are a guess.

    Megatron pads to the next multiple, so fewer rows than that are padding; dropping more would drop tokens.
    """
    info = reader.tensors.get(VOCABULARY[0])
    stored = info.shape[0] if info is not None and info.shape else wanted  # plan_hf names a missing one
    source = "--vocab-size" if options.vocab_size else f"vocab_size of {path}"
    where = f"{reader.directory}: {VOCABULARY[0]} has {stored} rows, expected {wanted} ({source})"
    if stored > wanted:
        multiple = _padding_multiple(args)
        if multiple and stored - wanted >= multiple and not options.vocab_size:
            raise CheckpointError(
                f"{where}: Megatron pads to a multiple of {multiple}, so {stored - wanted} rows are not padding; "
                f"--vocab-size {wanted} drops them all the same"
            )
        return f"{wanted} of {stored} vocabulary rows ({stored - wanted} padding rows dropped)"
    if stored == wanted:
        return f"{wanted} vocabulary rows"
    if not options.pad_vocab:
        raise CheckpointError(
            f"{where}; --pad-vocab adds {wanted - stored} rows of zeros, --vocab-size {stored} writes what is there"
        )
    return f"{stored} vocabulary rows and {wanted - stored} rows of zeros"


def _padding_multiple(args: Any) -> int | None:
    """What the run padded its vocabulary to (megatron/training/tokenizer/tokenizer.py:112); None if it does not say."""
    sizes = [getattr(args, name, None) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size")]
    return sizes[0] * sizes[1] if all(type(size) is int and 0 < size < 2**31 for size in sizes) else None


def row_bytes(tensor: HfTensor) -> int:
    count = NUMPY_DTYPES[tensor.dtype].itemsize
    for size in tensor.shape[1:]:
        count *= size
    return count


# ---------------------------------------------------------------- write


@dataclass(frozen=True)
class Unit:
    """One Megatron tensor (one layer of a stack) and the Hugging Face tensors that its rows go to."""

    key: str
    layer: int | None
    tensors: tuple[HfTensor, ...]

    @property
    def name(self) -> str:
        return self.key if self.layer is None else f"{self.key}#{self.layer}"

    @property
    def nbytes(self) -> int:
        return sum(row_bytes(t) * t.shape[0] for t in self.tensors)

    def moves(self) -> list[tuple[int, int, HfTensor, int]]:
        """(first row, end row, tensor, its row) in the order in which the checkpoint stores them."""
        found = []
        for tensor in self.tensors:
            row = 0
            for start, stop in tensor.runs:
                found.append((start, stop, tensor, row))
                row += stop - start
        return sorted(found, key=lambda move: move[0])


def write_weights(reader: torch_dist.Reader, conversion: Conversion, out: Staging, threads: int) -> None:
    place = {}
    for file, layout in conversion.layouts.items():
        out.create(file, layout.size)
        out.write(file, 0, memoryview(layout.header))
        place.update({name: (file, offset) for name, offset in layout.offsets.items()})
    grouped: dict[tuple[str, int | None], list[HfTensor]] = {}
    for tensor in conversion.tensors:
        grouped.setdefault((tensor.key, tensor.layer), []).append(tensor)
    units = [Unit(key, layer, tuple(tensors)) for (key, layer), tensors in grouped.items()]
    units.sort(key=lambda unit: -unit.nbytes)  # the longest first: threads end together
    progress = cli.Progress(sum(unit.nbytes for unit in units), "converting")

    def work(unit: Unit) -> None:
        if out.done(unit.name):
            progress.add(unit.nbytes)
            return
        ranges = []
        for start, stop, tensor, row in unit.moves():
            file, offset = place[tensor.name]
            width = row_bytes(tensor)
            for first, last in bands(start, stop, width):
                flat = buffer((last - first) * width, np.uint8)
                rows = flat.view(NUMPY_DTYPES[tensor.dtype]).reshape(last - first, *tensor.shape[1:])
                crc = reader.read_into(unit.key, first, rows, layer=unit.layer)
                position = offset + (row + first - start) * width
                out.write(file, position, memoryview(flat))
                ranges.append((file, position, flat.nbytes, zlib.crc32(flat) if crc is None else crc))
                progress.add(flat.nbytes)
        reader.verify_read(unit.key, unit.layer)  # a resumed run does not read it again
        out.record(unit.name, ranges)

    try:
        for_each(units, work, threads)
        reader.verify()
    finally:
        progress.close()


def write_rest(conversion: Conversion, out: Staging, origin: Path) -> None:
    for path in safetensors_io.companions(origin):
        if path.name != "config.json":
            out.copy(path)
    out.write_json(safetensors_io.INDEX, safetensors_io.index(conversion.files))
    out.write_json("config.json", conversion.config)


if __name__ == "__main__":
    sys.exit(cli.run(main))
