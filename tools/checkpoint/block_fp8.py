"""Block-scaled FP8 (E4M3): the one place in this repository that knows how to round to it.

The format. A matrix is cut into blocks, 128x128 for weights and 1x128 along the contraction axis for activations and
gradients. Every block has one float32 scale; every element is one E4M3 byte (1 sign, 4 exponent, 3 mantissa bits,
largest finite value 448, no infinity). The value that a GEMM sees is `code * scale_inv`.

The rule, per block (TransformerEngine v2.4.0, common/recipe/recipe_common.cuh:16-48 and
common/transpose/quantize_transpose_{square,vector}_blockwise.cu):

    amax      = max |x| over the block; NaN elements do not count; elements beyond a ragged edge do not exist
    scale     = 448 / amax, correctly rounded; 1 if amax is 0 or infinite; if the quotient overflows float32,
                the largest finite value of the input's dtype
    power-of-two mode (TE's default): clear the mantissa of `scale`, that is, round it DOWN, so nothing ever clips
    scale_inv = 1 / scale
    code      = E4M3(x * scale), round to nearest even, saturating to +-448; NaN gives 0x7f

NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 turns the power-of-two mode off, here as in TE.

slime's weight sync (slime/utils/fp8_kernel.py at 8359c9a) starts from the other side, in float32 scales only:

    scale_inv = max(amax, 1e-10) / 448
    scale     = 1 / scale_inv

Both are correctly rounded, and yet differ in the last bit of every fourth scale and in one code of 4000.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
NAN_CODE = 0x7F
WEIGHT_BLOCK = (BLOCK, BLOCK)
ROW_BLOCK = (1, BLOCK)  # along the last axis: the contraction axis of fprop (x) and dgrad (dy)
COLUMN_BLOCK = (BLOCK, 1)  # along the first axis: the contraction axis of wgrad (both operands)
SCALES_ENV = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
SLIME_EPSILON = 1e-10

Formula = Literal["te", "slime"]

# numba's loop has one thread: torch rounds where it has more than so many, unless a matrix is too small for them.
FEW_THREADS, SMALL = 4, 1 << 16

_EXPONENT = 0x7F800000
_SMALLEST_NORMAL = 2.0**-6
# Adding 1.5 * 2**20 * e to a number of binade e leaves a float32 whose last bit weighs e / 8, which is the E4M3 spacing
# in that binade: the float32 adder then does the rounding to nearest even for us.
_ROUNDER = 1.5 * 2.0**20


@dataclass(frozen=True)
class BlockFP8:
    """A quantised matrix.

    codes: (rows, columns) uint8, E4M3 bit patterns. scale_inv: (ceil(rows / block[0]), ceil(columns / block[1])).
    """

    codes: Tensor
    scale_inv: Tensor
    block: tuple[int, int]

    def dequantize(self) -> Tensor:
        """(rows, columns) float32: code * scale_inv."""
        values = self.codes.view(torch.float8_e4m3fn).float()
        tiles = _tiles(values, self.block)
        return _untile(tiles * self.scale_inv[:, None, :, None], values.shape)


def power_of_two_scales() -> bool:
    """Whether scales are powers of two: TE's default, switched off by NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1."""
    return os.environ.get(SCALES_ENV, "0") != "1"


def quantize(x: Tensor, block: tuple[int, int], *, pow2: bool, formula: Formula = "te") -> BlockFP8:
    """Quantise a matrix block by block.

    x: (rows, columns), float32, bfloat16 or float16; ragged edges are allowed. block: rows and columns of one block.
    formula: "te" or "slime", see the rules at the top of this file; slime's has no power-of-two mode.
    """
    tiles = _tiles(x.float(), block)
    amax = _amax(tiles)
    if formula == "slime":
        if pow2:
            raise ValueError("slime's formula has float32 scales only")
        inverse = amax.clamp(min=SLIME_EPSILON) / torch.tensor(E4M3_MAX, device=amax.device)  # see _scale
        scale = inverse.reciprocal()
    else:
        scale = _scale(amax, pow2=pow2, overflow=torch.finfo(x.dtype).max)
        inverse = scale.reciprocal()
    scaled = (tiles * scale).clamp_(-E4M3_MAX, E4M3_MAX)
    codes = _untile(scaled, x.shape).to(torch.float8_e4m3fn).view(torch.uint8)
    nan = x.isnan()
    if nan.any():
        codes[nan] = NAN_CODE
    return BlockFP8(codes, inverse[:, 0, :, 0], block)


def round_to_blocks(x: Tensor, block: tuple[int, int], *, pow2: bool) -> Tensor:
    """What a GEMM sees of `x`: quantize(x, block, pow2=pow2).dequantize(), bit for bit, several times faster.

    The FP8 bytes are never built: rounding happens in float32 (see _ROUNDER), which is what makes emulated training
    affordable on a CPU. x: (rows, columns). Returns float32.
    """
    if not x.is_cuda and (torch.get_num_threads() <= FEW_THREADS or x.numel() <= SMALL):
        rounded = _round_with_numba(x, block, pow2=pow2)
        if rounded is not None:
            return rounded
    return _round_with_torch(x, block, pow2=pow2)


@functools.cache
def _fused() -> ModuleType | None:
    """numba's loops, where it is installed and finds a directory for its cache."""
    try:
        from tools.checkpoint import block_fp8_numba
    except (ImportError, RuntimeError):
        return None
    return block_fp8_numba


def _round_with_numba(x: Tensor, block: tuple[int, int], *, pow2: bool) -> Tensor | None:
    """None without numba, and for a matrix that is not finite."""
    fused = _fused()
    if fused is None:
        return None
    raw, signed = (x, torch.int16) if x.dtype == torch.bfloat16 else (x.float(), torch.int32)
    bits = raw.detach().contiguous().view(signed).numpy().view(f"u{raw.itemsize}")  # numpy knows no bfloat16
    rounded = torch.empty(x.shape, dtype=torch.float32)
    rule = fused.TE_POW2 if pow2 else fused.TE_FP32
    finite = fused.round_to_blocks(bits, rounded.numpy(), block, rule, torch.finfo(x.dtype).max)
    return rounded if finite else None


def _round_with_torch(x: Tensor, block: tuple[int, int], *, pow2: bool) -> Tensor:
    tiles = _tiles(x.float(), block)
    amax = _amax(tiles)
    scale = _scale(amax, pow2=pow2, overflow=torch.finfo(x.dtype).max)
    scaled = tiles * scale
    if not torch.isfinite(amax).all():  # the scale is 1 there, so elements may exceed the range
        scaled.clamp_(-E4M3_MAX, E4M3_MAX)
    binade = scaled.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    binade.clamp_(min=_SMALLEST_NORMAL).mul_(_ROUNDER)
    # NaN survives as NaN: its binade is infinite, and NaN + inf - inf is NaN.
    # A float32 sum cannot give back the sign of a negative number that rounds to zero: copysign does.
    rounded = scaled.add(binade).sub_(binade).copysign_(scaled).mul_(scale.reciprocal())
    return _untile(rounded, x.shape)


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """(rows, columns) -> (row blocks, block[0], column blocks, block[1]); ragged edges are filled with zeros."""
    rows, columns = x.shape
    down, right = -rows % block[0], -columns % block[1]
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    return x.reshape(x.shape[0] // block[0], block[0], x.shape[1] // block[1], block[1])


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of _tiles: drops the filling again."""
    a, b, c, d = tiles.shape
    return tiles.reshape(a * b, c * d)[: shape[0], : shape[1]]


def _amax(tiles: Tensor) -> Tensor:
    """Largest magnitude per block, NaN elements ignored. Returns (row blocks, 1, column blocks, 1)."""
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True)
    if amax.isnan().any():
        amax = tiles.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).abs().amax(dim=(1, 3), keepdim=True)
    return amax


def _scale(amax: Tensor, *, pow2: bool, overflow: float) -> Tensor:
    """The quantisation scale of each block: see the rule at the top of this file."""
    # A 0-dimensional numerator: `448.0 / amax` would be computed as reciprocal * 448, one bit off for 28 % of amax.
    # (CUDA does the same to a number in the denominator.)
    scale = torch.div(torch.tensor(E4M3_MAX, device=amax.device), amax)
    scale.masked_fill_(scale.isinf(), overflow)
    scale.masked_fill_((amax == 0) | amax.isinf(), 1.0)
    return scale.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32) if pow2 else scale
