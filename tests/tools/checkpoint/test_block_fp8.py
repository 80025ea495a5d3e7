"""FP8 block scaling against a second implementation: plain loops over blocks, numpy and ml_dtypes' E4M3."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tools.checkpoint import block_fp8
from tools.checkpoint.block_fp8 import (
    COLUMN_BLOCK,
    ROW_BLOCK,
    SCALES_ENV,
    WEIGHT_BLOCK,
    power_of_two_scales,
    quantize,
    round_to_blocks,
)

DTYPES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def reference(x: np.ndarray, block: tuple[int, int], pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8, scale_inv float32) of TransformerEngine v2.4.0, one block after another."""
    largest = np.float32(ml_dtypes.finfo(x.dtype).max)
    values = x.astype(np.float32)
    rows, columns = (-(-size // step) for size, step in zip(x.shape, block, strict=True))
    codes, inverse = np.empty(x.shape, np.uint8), np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            here = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            part = values[here]
            amax = np.abs(part[~np.isnan(part)]).max(initial=np.float32(0))
            if amax == 0 or np.isinf(amax):
                scale = np.float32(1)
            else:
                scale = np.float32(448) / amax
                scale = largest if np.isinf(scale) else scale
            if pow2:
                scale = (scale.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
            inverse[i, j] = np.float32(1) / scale
            codes[here] = np.clip(part * scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes, inverse


@st.composite
def matrices(draw) -> tuple[torch.Tensor, np.ndarray]:
    """A matrix with ragged edges: numbers of a random size per tile, then arbitrary bit patterns here and there."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    rows, columns = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = rng.uniform(
        *draw(st.sampled_from([(-3, 3), (-38, 38), (-44, -30), (0, 0)])), (rows, -(-columns // 100))
    )
    x = rng.standard_normal((rows, columns)) * 10.0 ** np.repeat(exponents, 100, axis=1)[:, :columns]
    x[rng.random(x.shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0.0
    with np.errstate(over="ignore"):
        x = x.astype(np.float32).astype(DTYPES[dtype])
    count = draw(st.sampled_from([0, 0, 1, 20]))
    raw = x.reshape(-1).view(np.uint32 if dtype == torch.float32 else np.uint16)
    raw[rng.integers(0, raw.size, count)] = rng.integers(0, np.iinfo(raw.dtype).max, count, dtype=raw.dtype)
    signed = x.view(np.int32 if dtype == torch.float32 else np.int16)
    return torch.from_numpy(signed).view(dtype), x


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits; any NaN equals any other."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


@pytest.mark.parametrize("block", [WEIGHT_BLOCK, ROW_BLOCK, COLUMN_BLOCK])
@pytest.mark.parametrize("pow2", [True, False])
@settings(max_examples=60, deadline=None)
@given(pair=matrices())
def test_codes_and_scales_equal_the_reference(block, pow2, pair):
    x, numbers = pair
    with np.errstate(all="ignore"):
        codes, inverse = reference(numbers, block, pow2)
    ours = quantize(x, block, pow2=pow2)
    assert ours.scale_inv.shape == inverse.shape
    assert same(ours.scale_inv.numpy(), inverse)
    as_floats = ours.codes.numpy().view(ml_dtypes.float8_e4m3fn)
    assert same(as_floats, codes.view(ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("block", [WEIGHT_BLOCK, ROW_BLOCK, COLUMN_BLOCK])
@pytest.mark.parametrize("pow2", [True, False])
@settings(max_examples=60, deadline=None)
@given(pair=matrices(), columns_first=st.booleans())
def test_fast_rounding_equals_the_codes(kernel, block, pow2, pair, columns_first):
    x, _ = pair
    x = x.t().contiguous().t() if columns_first else x
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "torch":
            patch.setattr(block_fp8, "_fused", lambda: None)
        else:
            assert block_fp8._fused() is not None
            patch.setattr(block_fp8, "SMALL", x.numel())  # for numba however many threads there are
        rounded = round_to_blocks(x, block, pow2=pow2)
    assert same(rounded.numpy(), quantize(x, block, pow2=pow2).dequantize().numpy())


def test_numba_rounds_unless_torch_has_many_threads_for_it(monkeypatch):
    """And never what is not finite."""
    torch_rounds = []
    rounding = block_fp8._round_with_torch

    def recorded(x, block, *, pow2):
        torch_rounds.append(x.shape)
        return rounding(x, block, pow2=pow2)

    monkeypatch.setattr(block_fp8, "_round_with_torch", recorded)
    for threads, size, bad, expected in [(2, 300, 0, 0), (16, 300, 0, 1), (16, 200, 0, 0), (2, 300, 1, 1)]:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        x = torch.ones(size, 300)
        x[0, 0] = torch.inf if bad else 1.0
        torch_rounds.clear()
        round_to_blocks(x, WEIGHT_BLOCK, pow2=True)
        assert len(torch_rounds) == expected, (threads, size, bad)


@given(amax=st.floats(2.0**-100, 2.0**100, width=32))
@example(amax=448.0)
@example(amax=np.nextafter(np.float32(448), np.float32(0)).item())
def test_power_of_two_scales_never_clip(amax):
    x = torch.tensor([[amax, -amax, amax / 3]])
    q = quantize(x, ROW_BLOCK, pow2=True)
    mantissa, _ = np.frexp(q.scale_inv.numpy())
    assert (mantissa == 0.5).all()
    assert (q.dequantize()[0, :2].abs() - amax).abs().max() <= amax / 16


@pytest.mark.parametrize(("value", "pow2"), [(None, True), ("0", True), ("1", False)])
def test_the_variable_that_transformer_engine_reads(monkeypatch, value, pow2):
    monkeypatch.delenv(SCALES_ENV, raising=False)
    if value is not None:
        monkeypatch.setenv(SCALES_ENV, value)
    assert power_of_two_scales() is pow2
