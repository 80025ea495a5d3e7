"""The benchmark of block-scaled products: what it multiplies everywhere, that it knows a wrong product."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import fp8_gemm
from tests.conftest import REPO, run
from tools.checkpoint import block_fp8


def test_products_are_those_of_the_models():
    """Each layer's three products do the same work; their sum is six operations per weight and token."""
    for model, weights in (("1.5B", 28 * 46_792_704), ("7B", 28 * 233_046_016)):
        found = list(fp8_gemm.products(model, 1024))
        assert len(found) == 12
        assert sum(2 * p.m * p.n * p.k for p in found) == 6 * 1024 * weights // 28


@pytest.mark.parametrize("columns", [512, 640])
def test_scales_lie_as_cublas_reads_them(columns):
    x = torch.randn(256, columns).bfloat16()
    tiles = fp8_gemm.cublas_scales(block_fp8.quantize(x, block_fp8.ROW_BLOCK, pow2=True))
    assert tiles.shape == (256, columns // 128) and tiles.stride() == (1, 256)
    quantised = block_fp8.quantize(x, block_fp8.WEIGHT_BLOCK, pow2=True)
    blocks = fp8_gemm.cublas_scales(quantised)
    padded = -(-columns // 128 // 4) * 4
    assert blocks.shape == (padded, 2) and blocks.stride() == (1, padded)
    assert torch.equal(blocks[: columns // 128].t(), quantised.scale_inv)


def test_without_a_gpu_it_says_so():
    result = run(sys.executable, REPO / "benchmarks" / "fp8_gemm.py", env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "expected a GPU" in result.stderr


@pytest.mark.parametrize("second", [block_fp8.WEIGHT_BLOCK, block_fp8.ROW_BLOCK])
def test_a_product_is_the_emulated_one_up_to_its_rounding(second):
    """What the GPU computes is checked where it is timed; here, that the check knows a wrong product."""
    x, y = torch.randn(256, 640).bfloat16(), torch.randn(384, 640).bfloat16()
    a = block_fp8.quantize(x, block_fp8.ROW_BLOCK, pow2=False)
    b = block_fp8.quantize(y, second, pow2=False)
    emulated = a.dequantize() @ b.dequantize().t()
    assert 1e-3 < fp8_gemm.agreement("fc1", emulated.bfloat16(), emulated) < 3e-3
    misplaced = replace(b, scale_inv=b.scale_inv.roll(1, dims=1))
    for wrong in (x.float() @ y.float().t(), a.dequantize() @ misplaced.dequantize().t(), emulated * torch.nan):
        with pytest.raises(SystemExit, match=r"^fc1: expected the emulated product up to 0\.004, found a relative"):
            fp8_gemm.agreement("fc1", wrong, emulated)
