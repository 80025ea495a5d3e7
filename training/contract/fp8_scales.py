"""Which scales a block-FP8 checkpoint was cast with: powers of two, or any float32 number.

Transformer Engine makes either (NVTE_FP8_BLOCK_SCALING_FP32_SCALES), and a policy that is trained with one and
sampled with the other sees its weights rounded twice.  tools/bf16_cast_fp8.py writes the format into the metadata
of each safetensors file; of other checkpoints some scales are read.  Standard library only: a safetensors file is
8 bytes of header length, a JSON header, and the elements.
"""

from __future__ import annotations

import json
import math
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.contract.contract import Problem
from training.contract.hf_model import ModelError, read_config
from training.contract.rules import RECIPE, located

FORMATS = ("pow2", "fp32")
KEY = "fp8_scale_format"  # tools/checkpoint/fp8_cast.py writes it
SUFFIX = "_scale_inv"
TENSORS, SCALES = 8, 4096  # so much of a checkpoint without metadata is read
LONGEST_HEADER = 100 << 20  # as the safetensors library

# safetensors type of a scale -> (struct format, bytes); bfloat16 is the upper half of a float32
SCALE_TYPES = {"F32": ("f", 4), "F16": ("e", 2), "BF16": ("H", 2)}


def scale_format(path: str | Path) -> str:
    """ "pow2", "fp32", or "bf16" of a model that is not quantised.  `path`: its directory or its config.json.

    Raises ModelError, naming the file, for another quantisation, weights that are not there, a damaged header, or files
    that contradict each other.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    method = (read_config(path).get("quantization_config") or {}).get("quant_method")
    if method is None:
        return "bf16"
    if method != "fp8":
        raise ModelError(f"{folder / 'config.json'}: quantization_config.quant_method: expected fp8, found {method!r}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors in it, the format of its FP8 scales is not known")
    headers = {file: _header(file) for file in files}
    said = {file: header.get("__metadata__", {}).get(KEY) for file, header in headers.items()}
    named = {file: word for file, word in said.items() if word is not None}
    for file, word in named.items():
        if word not in FORMATS:
            raise ModelError(f"{file}: metadata {KEY}: expected {' or '.join(FORMATS)}, found {word!r}")
    if len(set(named.values())) > 1:
        raise ModelError(f"{folder}: its files have different FP8 scales: {_listed(named)}")
    return next(iter(named.values())) if named else _look(headers, folder)


def check(path: str, wanted: str) -> list[Problem]:
    """Whether the checkpoint's scales are the trainer's; a difference comes with the command that removes it."""
    found = scale_format(path)
    if found == wanted == "pow2":
        message = "slime's weight sync makes fp32 scales whatever the trainer has, rollouts and trainer will differ"
        return [Problem("warning", "--scale-format", message, located("slime/utils/fp8_kernel.py:55"))]
    if found == wanted:
        return []
    if found == "bf16":
        message = f"{path} is not quantised: rollouts compute in BF16, there are no scales to compare"
        return [Problem("warning", "--scale-format", message, RECIPE)]
    folder = path if Path(path).is_dir() else str(Path(path).parent)
    fix = (
        f"python tools/bf16_cast_fp8.py --input-bf16-hf-path THE_BF16_MODEL --output-fp8-hf-path {shlex.quote(folder)} "
        f"--force-pow-2-scale {wanted == 'pow2'} --force"
    )
    message = f"{folder} has {found} scales, expected {wanted} as the trainer; cast it again: {fix}"
    return [Problem("error", "--scale-format", message, RECIPE)]


def _listed(named: dict[Path, str]) -> str:
    return ", ".join(f"{file.name} {word}" for file, word in named.items())


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("no JSON object")
        header["__begin__"] = 8 + length
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise ModelError(f"{file}: expected a safetensors header, found {error}") from error
    return header


def _look(headers: dict[Path, dict[str, Any]], folder: Path) -> str:
    """The format that some scales have, read from tensors all over the checkpoint."""
    found = [(file, name) for file, header in headers.items() for name in header if name.endswith(SUFFIX)]
    if not found:
        raise ModelError(f"{folder}: config.json says fp8, but no file has a tensor *{SUFFIX}")
    for file, name in found[:: math.ceil(len(found) / TENSORS)]:
        for scale in _scales(file, headers[file], name):
            if scale and math.frexp(scale)[0] != 0.5:  # a zero, from an underflow, says nothing
                return "fp32"
    return "pow2"


def _scales(file: Path, header: dict[str, Any], name: str) -> Iterator[float]:
    try:
        kind, (start, stop) = header[name]["dtype"], header[name]["data_offsets"]
        if kind == "F8_E8M0":  # holds nothing but powers of two
            return
        if kind not in SCALE_TYPES:
            raise ValueError(f"type {kind}")
        letter, size = SCALE_TYPES[kind]
        count = min((stop - start) // size, SCALES)
        with file.open("rb") as stream:
            stream.seek(header["__begin__"] + start)
            values = struct.unpack(f"<{count}{letter}", stream.read(count * size))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: {name}: expected a tensor of scales, found {error}") from error
    for value in values:
        yield struct.unpack("<f", struct.pack("<HH", 0, value))[0] if kind == "BF16" else value
