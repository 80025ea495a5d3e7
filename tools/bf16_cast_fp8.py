#!/usr/bin/env python3
"""Cast the linear weights of a Hugging Face model to block FP8, for FP8 rollouts and serving.

  python tools/bf16_cast_fp8.py \\
    --input-bf16-hf-path models/InfiR2-7B --output-fp8-hf-path models/InfiR2-7B-FP8 --force-pow-2-scale False

E4M3, one float32 `weight_scale_inv` per 128x128 block, as SGLang, vLLM, transformers and slime's weight sync read it.
The projections of the decoder layers are cast; embeddings, lm_head, norms and biases keep their bits.

--force-pow-2-scale: True gives scales that are powers of two, the default of TransformerEngine v2.4.0, of CPT and of
SFT. False gives float32 scales, what NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 selects in TransformerEngine: RL sets it,
so a model for its rollouts wants False. --scale-formula te is bit for bit TransformerEngine's weight; slime is
slime's online weight sync, which differs in the last bit of some float32 scales.

NaN and infinity are an error that names the tensor. With --allow-nonfinite a NaN becomes the code 0x7f and does not
count in its block; infinity becomes 448, and its block has scale 1.

Runs on every CPU core with numba, otherwise with torch; --device cuda casts on a GPU. The bits are the same. Memory
does not grow with the model. The output appears whole or not at all; after an interruption, --resume goes on.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and its threads spin while they start

import numpy as np  # noqa: E402

from tools.checkpoint import cli, safetensors_io  # noqa: E402
from tools.checkpoint.errors import CheckpointError  # noqa: E402
from tools.checkpoint.fp8_cast import (  # noqa: E402
    BLOCK,
    CASTABLE,
    SCALE_SUFFIX,
    Kernel,
    Rule,
    check_not_quantised,
    count_nonfinite,
    is_linear,
    kernel,
    quantization_config,
    scale_shape,
    tensor_parallel_problem,
)
from tools.checkpoint.parallel import PIECE, Later, bands, buffer, for_each  # noqa: E402
from tools.checkpoint.safetensors_io import ITEMSIZE, METADATA, Entry, HfReader  # noqa: E402
from tools.checkpoint.staging import Staging  # noqa: E402

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def parse(argv: Sequence[str] | None) -> Any:
    options = cli.parser(__doc__)
    options.add_argument("--input-bf16-hf-path", type=Path, required=True, metavar="A", help="Hugging Face directory")
    options.add_argument("--output-fp8-hf-path", type=Path, required=True, metavar="B", help="directory to make")
    options.add_argument(
        "--force-pow-2-scale",
        type=cli.boolean,
        default=True,
        metavar="{True,False}",
        help="scales are powers of two (default: True)",
    )
    options.add_argument(
        "--scale-formula", choices=("te", "slime"), default="te", help="whose scale, bit for bit (default: te)"
    )
    options.add_argument("--check-tp", type=cli.positive, metavar="N", help="refuse if N ranks cannot share the blocks")
    options.add_argument("--allow-nonfinite", action="store_true", help="cast NaN and infinity instead of refusing")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    cli.add_output_options(options)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started = time.monotonic()
    rule = Rule(options.force_pow_2_scale, options.scale_formula)
    if rule.formula == "slime" and rule.pow2:
        raise CheckpointError("--scale-formula slime has float32 scales: it needs --force-pow-2-scale False")
    path = options.input_bf16_hf_path / "config.json"
    config = safetensors_io.read_json(path)
    with HfReader(options.input_bf16_hf_path) as source:
        check_not_quantised(config, path, source.tensors.values())
        aligned = tensor_parallel_note(config, path, options.check_tp)
        linear = {entry.name for entry in source.tensors.values() if is_linear(entry)}
        if not linear:
            raise CheckpointError(f"{source.directory}: no *_proj.weight of a decoder layer in it, nothing to cast")
        dtypes = {source.tensors[name].dtype for name in linear}
        how = Later(lambda: kernel(options.device, rule).warm_up(dtypes))
        files = {file: list(described(source, file, linear)) for file in source.files}
        metadata = {file: {**METADATA, **source.metadata[file], **rule.metadata()} for file in source.files}
        layouts = {file: safetensors_io.plan_file(files[file], metadata[file]) for file in files}
        size = sum(layout.size for layout in layouts.values())
        scales = "power-of-two" if rule.pow2 else "float32"
        count = f"{len(linear)} of {len(source.tensors)} tensors to E4M3"
        print(f"{source.directory} -> {options.output_fp8_hf_path}: {count}, {scales} scales ({rule.formula})")
        print(aligned)
        with Staging(
            options.output_fp8_hf_path,
            job={
                "tool": "bf16_cast_fp8",
                "from": source.sources(),
                "headers": {file: zlib.crc32(layout.header) for file, layout in layouts.items()},
                "nonfinite": options.allow_nonfinite,
            },
            size=size,
            inputs=(options.input_bf16_hf_path,),
            force=options.force,
            resume=options.resume,
            fsync=options.fsync,
        ) as out:
            for file, layout in layouts.items():
                out.create(file, layout.size)
                out.write(file, 0, memoryview(layout.header))
            cast(source, linear, layouts, how, out, options)
            for companion in safetensors_io.companions(source.directory):
                if companion.name != "config.json":
                    out.copy(companion)
            kept = [entry for entry in source.tensors.values() if entry.name not in linear]
            out.write_json(safetensors_io.INDEX, safetensors_io.index(files))
            out.write_json("config.json", {**config, "quantization_config": quantization_config(kept)})
            out.publish()
        read = source.nbytes
    name = how.get().name
    print(cli.summary(f"{options.output_fp8_hf_path} ({name})", read, size, time.monotonic() - started))
    return 0


def tensor_parallel_note(config: dict[str, Any], path: Path, wanted: int | None) -> str:
    """Which tensor parallel sizes an engine accepts these blocks at, in words. Raises CheckpointError if not
    `wanted`.
    """
    problems: dict[int, str | None] = {}
    for size in sorted({*TENSOR_PARALLEL_SIZES, *([wanted] if wanted else [])}):
        try:
            problems[size] = tensor_parallel_problem(config, size)
        except (KeyError, TypeError, ZeroDivisionError, OverflowError):
            if wanted:
                raise CheckpointError(f"--check-tp: {path} lacks the sizes of a decoder, cannot check") from None
            return "block-aligned tensor parallel sizes: not known for this model"
    if wanted and problems[wanted]:
        raise CheckpointError(f"--check-tp {wanted}: {problems[wanted]} ({path})")
    good = [str(size) for size, problem in problems.items() if problem is None]
    bad = [f"{size}: {problem}" for size, problem in problems.items() if problem]
    return f"block-aligned tensor parallel sizes: {' '.join(good)}" + (f" (not {'; not '.join(bad)})" if bad else "")


def described(source: HfReader, file: str, linear: set[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of what the output file holds for an input file."""
    for entry in source.tensors.values():
        if entry.file != file:
            continue
        if entry.name in linear:
            yield entry.name, "F8_E4M3", entry.shape
            yield entry.name + SCALE_SUFFIX, "F32", scale_shape(entry.shape)
        else:
            yield entry.name, entry.dtype, entry.shape


# ---------------------------------------------------------------- work


@dataclass(frozen=True)
class Unit:
    """Bytes [start, stop) of a tensor that keeps its bits, or rows [start, stop) of one that is cast."""

    entry: Entry
    start: int
    stop: int
    linear: bool

    @property
    def nbytes(self) -> int:
        width = self.entry.shape[1] * ITEMSIZE[self.entry.dtype] if self.linear else 1
        return (self.stop - self.start) * width

    @property
    def name(self) -> str:
        return f"{self.entry.name}:{self.start}-{self.stop}"


def units(source: HfReader, linear: set[str]) -> Iterator[Unit]:
    """Pieces in file order, what keeps its bits first: the kernel loads meanwhile. A row of blocks is never cut."""
    for entry in source.tensors.values():
        if entry.name not in linear:
            for start, stop in bands(0, entry.nbytes, 1):
                yield Unit(entry, start, stop, False)
    for entry in source.tensors.values():
        if entry.name in linear:
            rows = max(1, PIECE // (entry.shape[1] * ITEMSIZE[entry.dtype]) // BLOCK) * BLOCK
            for start in range(0, entry.shape[0], rows):
                yield Unit(entry, start, min(start + rows, entry.shape[0]), True)


def cast(
    source: HfReader,
    linear: set[str],
    layouts: dict[str, safetensors_io.Plan],
    how: Later[Kernel],
    out: Staging,
    options: Any,
) -> None:
    progress = cli.Progress(source.nbytes, "casting")
    strict = not options.allow_nonfinite or options.scale_formula == "slime"

    def nonfinite(entry: Entry, where: str, hint: str) -> CheckpointError:
        path = source.directory / entry.file
        return CheckpointError(f"{path}: {entry.name}: NaN or infinity in {where}, expected finite weights{hint}")

    def put(file: str, offset: int, array: np.ndarray) -> tuple[str, int, int, int]:
        view = memoryview(array.reshape(-1).view(np.uint8))
        out.write(file, offset, view)
        return file, offset, len(view), zlib.crc32(view)

    def work(unit: Unit) -> None:
        if not out.done(unit.name):
            out.record(unit.name, cast_rows(unit) if unit.linear else copy(unit))
        progress.add(unit.nbytes)

    def copy(unit: Unit) -> list:
        data = buffer(unit.nbytes, np.uint8)
        source.read_into(unit.entry, unit.start, memoryview(data))
        if unit.entry.dtype in CASTABLE and not options.allow_nonfinite:
            bad = count_nonfinite(data.view(f"u{ITEMSIZE[unit.entry.dtype]}"), unit.entry.dtype)
            if bad:
                raise nonfinite(unit.entry, f"{bad} elements", "; --allow-nonfinite keeps them")
        return [put(unit.entry.file, layouts[unit.entry.file].offsets[unit.entry.name] + unit.start, data)]

    def cast_rows(unit: Unit) -> list:
        entry, rows, columns = unit.entry, unit.stop - unit.start, unit.entry.shape[1]
        raw = buffer(rows * columns, np.dtype(f"u{ITEMSIZE[entry.dtype]}")).reshape(rows, columns)
        source.read_into(entry, unit.start * columns * raw.itemsize, memoryview(raw.reshape(-1).view(np.uint8)))
        codes = buffer(rows * columns, np.uint8, "codes").reshape(rows, columns)
        scale_inv = np.empty(scale_shape(raw.shape), np.float32)
        bad = how.get().cast(raw, entry.dtype, codes, scale_inv)
        if bad and strict:
            hint = "" if options.scale_formula == "slime" else "; --allow-nonfinite casts them"
            raise nonfinite(entry, f"{bad} blocks of rows {unit.start} to {unit.stop - 1}", hint)
        offsets = layouts[entry.file].offsets
        above = unit.start // BLOCK * scale_inv.shape[1] * scale_inv.itemsize
        return [
            put(entry.file, offsets[entry.name] + unit.start * columns, codes),
            put(entry.file, offsets[entry.name + SCALE_SUFFIX] + above, scale_inv),
        ]

    try:
        for_each(units(source, linear), work, options.threads)
    finally:
        progress.close()


if __name__ == "__main__":
    sys.exit(cli.run(main))
