"""The block-FP8 cast and rounding of `block_fp8` as one fused loop each for the CPU: the same bits, the cast at the
speed of a bare type conversion.

Works on raw bit patterns, since numpy knows no bfloat16. Two facts make it short and fast:

- the magnitude of a floating-point number orders like its bits read as an unsigned integer, so amax is an integer
  maximum;
- adding 2**20 * e to a number of binade e makes the float32 adder round it to E4M3's spacing, ties to even; the
  binade is
  floored at 2**-6, which makes subnormals fall out of the same line. (`block_fp8` rounds with the same addition.)

No fast-math: LLVM must keep IEEE rounding. Import this module only where numba is installed.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_U32 = np.uint32
_BLOCK = 128
_OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}

TE_POW2, TE_FP32, SLIME = 0, 1, 2


@intrinsic
def _bits(_context, value):
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(_context, bits):
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@numba.njit(**_OPTIONS)
def _largest(row, n, magnitude, so_far):
    for c in range(n):
        so_far = max(so_far, row[c] & magnitude)
    return so_far


@numba.njit(**_OPTIONS)
def _largest_number(row, n, magnitude, infinity, so_far):
    """As _largest, but NaN does not count."""
    for c in range(n):
        bits = row[c] & magnitude
        if bits <= infinity:
            so_far = max(so_far, bits)
    return so_far


@numba.njit(**_OPTIONS)
def _encode(row, out, n, shift, scale):
    for c in range(n):
        bits = _bits(_float(_U32(row[c]) << shift) * scale)
        size = bits & _U32(0x7FFFFFFF)
        binade = max(size & _U32(0x7F800000), _U32(121 << 23))
        rounder = binade + _U32(20 << 23)
        steps = _bits(_float(size) + _float(rounder)) - rounder  # |x| in units of E4M3's spacing in this binade
        out[c] = np.uint8((steps + (binade >> _U32(20)) - _U32(121 << 3)) | ((bits >> _U32(24)) & _U32(0x80)))


@numba.njit(**_OPTIONS)
def _encode_nonfinite(row, out, n, shift, scale):
    """As _encode for a block with infinity (saturates to 448) or NaN (0x7f, as the hardware conversion gives)."""
    for c in range(n):
        bits = _bits(_float(_U32(row[c]) << shift) * scale)
        size = bits & _U32(0x7FFFFFFF)
        if size > _U32(0x7F800000):
            out[c] = np.uint8(0x7F)
            continue
        size = min(size, _U32(0x43E00000))  # 448
        binade = max(size & _U32(0x7F800000), _U32(121 << 23))
        rounder = binade + _U32(20 << 23)
        steps = _bits(_float(size) + _float(rounder)) - rounder
        out[c] = np.uint8((steps + (binade >> _U32(20)) - _U32(121 << 3)) | ((bits >> _U32(24)) & _U32(0x80)))


@numba.njit(**_OPTIONS)
def _scale(amax, rule, overflow):
    """(scale, scale_inv) of a block, by the rules at the top of `block_fp8`."""
    if rule == SLIME:
        inverse = max(amax, np.float32(1e-10)) / np.float32(448.0)
        return np.float32(1.0) / inverse, inverse
    scale = np.float32(1.0)
    if amax != np.float32(0.0) and not np.isinf(amax):
        scale = np.float32(448.0) / amax
        if np.isinf(scale):
            scale = overflow
        if rule == TE_POW2:
            scale = _float(_bits(scale) & _U32(0x7F800000))
    return scale, np.float32(1.0) / scale


@numba.njit(**_OPTIONS)
def _cast(x, codes, scale_inv, shift, magnitude, infinity, rule, overflow):
    rows, columns = x.shape
    nonfinite = 0
    for top in range(0, rows, _BLOCK):
        bottom = min(rows, top + _BLOCK)
        for left in range(0, columns, _BLOCK):
            right = min(columns, left + _BLOCK)
            width = right - left
            amax = magnitude & x[top, left]
            if width == _BLOCK:  # a constant trip count vectorises without a remainder
                for r in range(top, bottom):
                    amax = _largest(x[r, left:right], _BLOCK, magnitude, amax)
            else:
                for r in range(top, bottom):
                    amax = _largest(x[r, left:right], width, magnitude, amax)
            bad = amax >= infinity
            if bad:
                nonfinite += 1
                amax = magnitude & (magnitude ^ magnitude)
                for r in range(top, bottom):
                    amax = _largest_number(x[r, left:right], width, magnitude, infinity, amax)
            scale, inverse = _scale(_float(_U32(amax) << shift), rule, overflow)
            scale_inv[top // _BLOCK, left // _BLOCK] = inverse
            if bad:
                for r in range(top, bottom):
                    _encode_nonfinite(x[r, left:right], codes[r, left:right], width, shift, scale)
            elif width == _BLOCK:
                for r in range(top, bottom):
                    _encode(x[r, left:right], codes[r, left:right], _BLOCK, shift, scale)
            else:
                for r in range(top, bottom):
                    _encode(x[r, left:right], codes[r, left:right], width, shift, scale)
    return nonfinite


def cast(x: np.ndarray, codes: np.ndarray, scale_inv: np.ndarray, rule: int, overflow: float) -> int:
    """Quantise `x` in 128x128 blocks into `codes` and `scale_inv`; returns the number of blocks with inf or NaN.

    x: (rows, columns), the bits of bfloat16 as uint16 or of float32 as uint32. codes: the same shape, uint8.
    scale_inv: (ceil(rows/128), ceil(columns/128)) float32. rule: TE_POW2, TE_FP32 or SLIME. overflow: the scale where
    448 / amax overflows. Releases the GIL.
    """
    half = x.dtype == np.uint16
    number = np.uint16 if half else np.uint32
    magnitude, infinity = (number(0x7FFF), number(0x7F80)) if half else (number(0x7FFFFFFF), number(0x7F800000))
    return _cast(x, codes, scale_inv, _U32(16 if half else 0), magnitude, infinity, rule, np.float32(overflow))


@numba.njit(**_OPTIONS)
def _grow(amax, row, n, shift):
    for c in range(n):
        amax[c] = max(amax[c], (_U32(row[c]) << shift) & _U32(0x7FFFFFFF))


@numba.njit(**_OPTIONS)
def _round_row(row, out, n, shift, scale, inverse):
    for c in range(n):
        bits = _bits(_float(_U32(row[c]) << shift) * scale[c])
        size = bits & _U32(0x7FFFFFFF)
        rounder = _float(max(size & _U32(0x7F800000), _U32(121 << 23)) + _U32(20 << 23))
        value = (_float(size) + rounder) - rounder
        out[c] = _float(_bits(value) | (bits & _U32(0x80000000))) * inverse[c]


@numba.njit(**_OPTIONS)
def _round(x, out, height, width, shift, rule, overflow):
    rows, columns = x.shape
    amax, scale, inverse = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        for left in range(0, columns, _BLOCK):
            right = min(columns, left + _BLOCK)
            amax[:] = 0
            for r in range(top, bottom):
                _grow(amax, x[r, left:right], right - left, shift)
            largest = _largest(amax, _BLOCK, _U32(0x7FFFFFFF), _U32(0))
            if largest >= _U32(0x7F800000):
                return False
            if width == 1:
                for c in range(right - left):
                    scale[c], inverse[c] = _scale(_float(amax[c]), rule, overflow)
            else:
                scale[:], inverse[:] = _scale(_float(largest), rule, overflow)
            for r in range(top, bottom):
                _round_row(x[r, left:right], out[r, left:right], right - left, shift, scale, inverse)
    return True


def round_to_blocks(x: np.ndarray, out: np.ndarray, block: tuple[int, int], rule: int, overflow: float) -> bool:
    """Write what a GEMM sees of `x` into `out`, float32. Returns False where `x` is not finite; `out` is void then.

    block: ROW_BLOCK, COLUMN_BLOCK or WEIGHT_BLOCK; the rest is as in `cast`.
    """
    return _round(x, out, *block, _U32(16 if x.dtype == np.uint16 else 0), rule, np.float32(overflow))
