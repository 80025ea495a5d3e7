"""What a block-FP8 checkpoint is made of, and the kernel that casts to it on this machine.

The format is DeepSeek-V3's, which SGLang, vLLM, transformers and slime's weight sync read: `<module>.weight` in E4M3
with `<module>.weight_scale_inv` in float32, one number per 128x128 block, and `quantization_config` in config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tools.checkpoint.errors import CheckpointError
from tools.checkpoint.safetensors_io import DTYPES, ITEMSIZE, Entry

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
SCALE_FORMAT_KEY, FORMULA_KEY = "fp8_scale_format", "fp8_scale_formula"  # in the metadata of each file
CASTABLE = ("BF16", "F16", "F32")

# The projections of a decoder layer: what slime quantises when it syncs weights (megatron_to_hf/__init__.py:86 at the
# pin) and what inference engines hold as quantised linear layers. Routers, norms, embeddings and lm_head do not end
# in _proj.
_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\.(?:\S+\.)?\w*_proj(?:_with_mqa)?\.weight$")
_NOT_TEXT = re.compile(r"(?:^|\.)(?:visual|vision|audio)|\beh_proj\.")

_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # its bits
# The largest finite number of each type, which TransformerEngine takes for a scale that overflows.
_OVERFLOW = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234663852886e38}


@dataclass(frozen=True)
class Rule:
    """How scales are made. pow2: powers of two. formula: "te" or "slime" (see `block_fp8`)."""

    pow2: bool = True
    formula: Literal["te", "slime"] = "te"

    def metadata(self) -> dict[str, str]:
        return {SCALE_FORMAT_KEY: "pow2" if self.pow2 else "fp32", FORMULA_KEY: self.formula}


def is_linear(entry: Entry) -> bool:
    """Whether a tensor is the weight of a linear layer that is cast."""
    return (
        len(entry.shape) == 2
        and min(entry.shape) > 0
        and entry.dtype in CASTABLE
        and _LINEAR.search(entry.name) is not None
        and not _NOT_TEXT.search(entry.name)
    )


def count_nonfinite(raw: np.ndarray, dtype: str) -> int:
    """How many of `raw`, bits of safetensors `dtype` as unsigned integers, are NaN or infinity."""
    magnitudes = raw & raw.dtype.type(np.iinfo(raw.dtype).max >> 1)  # they order as the numbers do
    if not magnitudes.size or magnitudes.max() < _INFINITY[dtype]:
        return 0
    return int(np.count_nonzero(magnitudes >= _INFINITY[dtype]))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(row blocks, column blocks) of a matrix, ragged edges counted."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def quantization_config(kept: Iterable[Entry]) -> dict[str, Any]:
    """The entry for config.json. `kept`: the tensors that are not cast.

    Both spellings of the list of layers left alone: SGLang and transformers read either, vLLM `ignored_layers`. It
    always names lm_head, which is a module of its own in tied models as well.
    """
    modules = {"lm_head"}
    for entry in kept:
        module = entry.name.removesuffix(".weight")
        if module != entry.name and len(entry.shape) == 2 and not re.search(r"embed|norm", module):
            modules.add(module)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(modules),
        "ignored_layers": sorted(modules),
    }


def tensor_parallel_problem(config: dict[str, Any], size: int) -> str | None:
    """Why an inference engine refuses block-FP8 weights of this model at a tensor parallel size; None if it does not.

    SGLang (layers/quantization/fp8.py) and vLLM want whole 128-blocks on every rank. Key/value heads are replicated
    where there are fewer than ranks. At size 1 nothing is cut, so nothing must align.
    """
    if size == 1:
        return None
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if heads % size:
        return f"{heads} heads do not divide by {size}"
    if groups % size and size % groups:
        return f"{groups} key/value heads do not divide by {size}"
    for name, width in (
        ("q_proj rows and o_proj columns", heads // size * head_dim),
        ("k_proj and v_proj rows", max(1, groups // size) * head_dim),
        ("gate_proj and up_proj rows and down_proj columns", config["intermediate_size"] / size),
    ):
        if width % BLOCK:
            return f"{name}: {width:g} per rank are {width / BLOCK:g} blocks of {BLOCK}"
    return None


# ---------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Kernel:
    """`cast(raw, dtype, codes, scale_inv)` quantises whole rows of blocks and counts blocks with NaN or infinity.

    raw: (rows, columns) bits of safetensors `dtype` as unsigned integers. codes: the same shape, uint8. scale_inv:
    `scale_shape(raw.shape)`, float32. Every kernel gives the same bits. Any thread may call it.
    """

    name: str
    cast: Callable[[np.ndarray, str, np.ndarray, np.ndarray], int]

    def warm_up(self, dtypes: Iterable[str]) -> Kernel:
        """Have the machine code for safetensors `dtypes` at hand: the first call of each loads or compiles it."""
        for dtype in dtypes:
            raw = np.zeros((1, 1), np.dtype(f"u{ITEMSIZE[dtype]}"))
            self.cast(raw, dtype, np.empty((1, 1), np.uint8), np.empty((1, 1), np.float32))
        return self


def kernel(device: Literal["auto", "cpu", "cuda"], rule: Rule) -> Kernel:
    """The fastest kernel here: numba's on a CPU, else torch's. On a GPU a cast waits for the disk all the same, so
    "auto" takes CUDA only where numba is missing. Raises CheckpointError where nothing fits.
    """
    if device in ("auto", "cpu"):
        try:
            return _numba_kernel(rule)
        except (ImportError, RuntimeError):  # RuntimeError: numba finds no directory for its cache
            pass
    try:
        import torch
    except ImportError:
        raise CheckpointError("casting to FP8 needs numba (fast) or torch, and neither is installed") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda: torch finds no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _torch_kernel(rule, device)


def _numba_kernel(rule: Rule) -> Kernel:
    from tools.checkpoint import block_fp8_numba as fused

    number = fused.SLIME if rule.formula == "slime" else fused.TE_POW2 if rule.pow2 else fused.TE_FP32

    def cast(raw: np.ndarray, dtype: str, codes: np.ndarray, scale_inv: np.ndarray) -> int:
        if dtype == "F16":  # float32 holds every float16
            raw = raw.view(np.float16).astype(np.float32).view(np.uint32)
        return fused.cast(raw, codes, scale_inv, number, _OVERFLOW[dtype])

    return Kernel("numba", cast)


def _torch_kernel(rule: Rule, device: str) -> Kernel:
    import torch

    from tools.checkpoint import block_fp8

    def cast(raw: np.ndarray, dtype: str, codes: np.ndarray, scale_inv: np.ndarray) -> int:
        signed = raw.view(np.dtype(f"i{raw.itemsize}"))  # torch's unsigned types have no views
        x = torch.from_numpy(signed).view(getattr(torch, DTYPES[dtype])).to(device)
        quantized = block_fp8.quantize(x, block_fp8.WEIGHT_BLOCK, pow2=rule.pow2, formula=rule.formula)
        torch.from_numpy(codes).copy_(quantized.codes)
        torch.from_numpy(scale_inv).copy_(quantized.scale_inv)
        bad = ~torch.isfinite(x)
        if not bad.any():
            return 0
        rows, columns = (torch.div(index, BLOCK, rounding_mode="floor") for index in bad.nonzero(as_tuple=True))
        return len(torch.unique(torch.stack((rows, columns)), dim=1)[0])

    return Kernel(f"torch on {device}", cast)


def check_not_quantised(config: dict[str, Any], path: Path, entries: Iterable[Entry]) -> None:
    """Raise CheckpointError if the weights are quantised already."""
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: has a quantization_config, expected weights that are not quantised yet")
    for entry in entries:
        if entry.dtype.startswith("F8") or entry.name.endswith(SCALE_SUFFIX):
            raise CheckpointError(f"{entry.file}: {entry.name} is {entry.dtype}, expected BF16 weights")
