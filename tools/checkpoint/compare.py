"""Compare two checkpoints tensor by tensor: bits where both have bits, the rounding error where one is block FP8.

The bound on a cast. Rounding to E4M3 with a block's scale moves an element x by at most half a step of the grid around
x / scale_inv, which is x / 16 or less for a normal number (3 mantissa bits) and scale_inv / 1024 for a subnormal one.
If the scale fits its block, that is, if amax / scale_inv lies in (224, 448], the second kind adds next to nothing, so
the relative error of a whole block, norm(cast - original) / norm(original), is at most sqrt(1/256 + 3.1e-7) = 0.0626.
A scale that is wrong, lost or rounded shows as an element beyond half a step; one that is far too large, or a swapped
tensor, as a block beyond the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tools.checkpoint.fp8_cast import BLOCK
from tools.checkpoint.sources import Info, Source, as_float32, dequantize, spread

BLOCK_BOUND = 0.0626
_SLACK = 1 + 2.0**-16  # roundings of the scale and of two products to float32, each 2**-24, as parts of half a step
_BAND = 1 << 20  # bytes of one operand at a time
FP8 = "float8_e4m3fn"


@dataclass
class Result:
    """One tensor. verdict: "equal", "within bound", "different", "only in A", "only in B".

    rel_frobenius: ||a - b|| / ||reference||, the reference being the one that is not FP8, or A. worst_block: (row,
    column) of the block with the largest relative error, and that error.
    """

    name: str
    verdict: str
    dtype_a: str | None = None
    dtype_b: str | None = None
    shape: tuple[int, ...] | None = None
    differing: int = 0
    max_abs: float = 0.0
    rel_frobenius: float = 0.0
    snr_db: float | None = None
    worst_block: tuple[int, int, float] | None = None
    beyond_half_step: int = 0
    note: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in ("equal", "within bound")

    def json(self) -> dict[str, Any]:
        return {key: _finite(value) for key, value in asdict(self).items() if value not in (None, "")}


def _finite(value: Any) -> Any:
    """JSON has no infinity or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    return value


def names(a: Source, b: Source) -> list[str]:
    """All tensor names, in the order of A."""
    return [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]


def compare(a: Source, b: Source, name: str, bound: float) -> Result:
    """Compare one tensor. bound: largest relative error of a block where one side is FP8."""
    if name not in a.tensors or name not in b.tensors:
        return Result(name, "only in A" if name in a.tensors else "only in B")
    left, right = a.tensors[name], b.tensors[name]
    rows, note = _rows(a, b, left, right)
    if rows is None:
        text = f"shape {left.shape} in A, {right.shape} in B"
        return Result(name, "different", left.dtype, right.dtype, left.shape, note=text)
    result = Result(name, "equal", left.dtype, right.dtype, (rows, *left.shape[1:]), note=note)
    scales = [s.scales(name) if i.dtype == FP8 else None for s, i in ((a, left), (b, right))]

    def sides() -> Iterator[tuple[int, _Side, _Side]]:
        for start, stop in _bands(rows, left):
            x = _Side(a.read(name, start, stop), left.dtype, scales[0], start)
            yield start, x, _Side(b.read(name, start, stop), right.dtype, scales[1], start)

    if left.dtype == right.dtype and all(x.same(y) for _, x, y in sides()):
        return result
    total = _Total((left.dtype == FP8) != (right.dtype == FP8))
    for start, x, y in sides():
        total.add(x, y, start)
    total.finish(result, bound)
    return result


def _rows(a: Source, b: Source, left: Info, right: Info) -> tuple[int | None, str]:
    """How many rows to compare; None if the shapes contradict. Only Megatron pads, and only at the end."""
    if left.shape == right.shape:
        return (left.shape[0] if left.shape else 1), ""
    if left.shape[1:] != right.shape[1:] or not left.shape:
        return None, ""
    longer = a if left.shape[0] > right.shape[0] else b
    rows = min(left.shape[0], right.shape[0])
    if not longer.padded or len(left.shape) != 2:
        return None, ""
    return rows, f"{max(left.shape[0], right.shape[0]) - rows} padding rows not compared"


def _bands(rows: int, info: Info) -> list[tuple[int, int]]:
    """Ranges of whole rows of blocks."""
    width = 4 * math.prod(info.shape[1:])
    step = max(1, _BAND // max(1, BLOCK * width)) * BLOCK
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Side:
    """Some rows of one checkpoint: raw elements and, when asked for, their values."""

    def __init__(self, raw: np.ndarray, dtype: str, scales: np.ndarray | None, start: int):
        self.raw, self.dtype = raw, dtype
        self.scales = None if scales is None else scales[start // BLOCK : -(-(start + len(raw)) // BLOCK)]

    def values(self) -> np.ndarray:
        """(rows, columns) float32."""
        if self.scales is not None:
            return dequantize(self.raw, self.scales)
        values = as_float32(self.raw, self.dtype)
        return values.reshape(len(values), -1)

    def same(self, other: _Side) -> bool:
        """Equal bits, scales included."""
        if self.dtype != other.dtype or self.raw.tobytes() != other.raw.tobytes():
            return False
        return self.scales is None or self.scales.tobytes() == other.scales.tobytes()


class _Total:
    """Sums over the bands of one tensor."""

    def __init__(self, one_fp8: bool):
        self.one_fp8 = one_fp8
        self.differing = self.beyond = 0
        self.max_abs = self.error = self.reference = 0.0
        self.worst: tuple[int, int, float] | None = None

    def add(self, x: _Side, y: _Side, start: int) -> None:
        a, b = x.values().astype(np.float64), y.values().astype(np.float64)
        reference = b if x.dtype == FP8 and y.dtype != FP8 else a
        with np.errstate(invalid="ignore"):
            difference = np.abs(a - b)
        difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        difference[np.isnan(difference)] = np.inf  # a number against NaN
        self.differing += int(np.count_nonzero(difference))
        self.max_abs = max(self.max_abs, float(difference.max(initial=0)))
        finite = np.where(np.isfinite(reference), reference, 0)
        if not self.one_fp8:
            self.error += float(np.square(difference).sum())
            self.reference += float(np.square(finite).sum())
            return
        scales = x.scales if x.scales is not None else y.scales
        step = _half_step(finite, spread(scales.astype(np.float64), a.shape))
        self.beyond += int(np.count_nonzero(~(difference <= step * _SLACK)))
        error, size = _per_block(np.square(difference)), _per_block(np.square(finite))
        self.error += float(error.sum())
        self.reference += float(size.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(error == 0, 0.0, np.sqrt(error / size))
        row, column = np.unravel_index(int(np.argmax(relative)), relative.shape)
        found = (start // BLOCK + int(row), int(column), float(relative[row, column]))
        if self.worst is None or found[2] > self.worst[2]:
            self.worst = found

    def finish(self, result: Result, bound: float) -> None:
        result.differing, result.max_abs, result.beyond_half_step = self.differing, self.max_abs, self.beyond
        if self.error:
            result.rel_frobenius = math.sqrt(self.error / self.reference) if self.reference else math.inf
            result.snr_db = -20 * math.log10(result.rel_frobenius) if result.rel_frobenius else math.inf
        if self.one_fp8:
            result.worst_block = self.worst
            worst = self.worst[2] if self.worst else 0.0
            result.verdict = "within bound" if not self.beyond and worst <= bound else "different"
        else:  # equal values of two dtypes are equal; equal values in other bits (-0.0, NaN, scales) are not
            same = not self.differing and result.dtype_a != result.dtype_b
            result.verdict = "equal" if same else "different"


def _half_step(x: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """Half the distance of E4M3's neighbours around x / scale_inv, in units of x. NaN where the scale is no number."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        _, exponent = np.frexp(np.abs(x) / scale_inv)  # in [0.5, 1) * 2**exponent
    return np.ldexp(scale_inv, np.maximum(exponent - 1, -6) - 4)


def _per_block(values: np.ndarray) -> np.ndarray:
    """Sums over 128x128 blocks, ragged ones included."""
    rows = np.add.reduceat(values, np.arange(0, values.shape[0], BLOCK), axis=0)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], BLOCK), axis=1)
