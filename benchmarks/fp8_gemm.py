#!/usr/bin/env python3
"""What block-scaled FP8 products give on this GPU beside BF16 ones, and how far they are from the emulation.

    .venv/bin/python benchmarks/fp8_gemm.py --tokens 8192 --output exp/fp8_gemm.md

The three products of every linear layer of Qwen2.5 1.5B and 7B at tensor parallel 1, operands quantised by
tools/checkpoint/block_fp8.py: 1x128 tiles for activations and gradients, 128x128 blocks for weights. The FP8 product is
torch.nn.functional.scaled_mm, that is cuBLASLt's block scaling (Hopper, CUDA 12.9 or newer), which TransformerEngine
v2.4.0 calls too. Times are of the products alone, medians over rounds in which both take turns; quantising, which
TransformerEngine does with kernels of its own, comes on top of the FP8 column.

The last columns compare results: with the emulated product (the same operands, dequantised, summed in float32), where
only the order and width of the sums differ, and, for the size of that, with the product of the operands before
quantisation. Both as relative L2 distances.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from tools.checkpoint import block_fp8  # noqa: E402
from tools.checkpoint.block_fp8 import BLOCK, ROW_BLOCK, WEIGHT_BLOCK, BlockFP8  # noqa: E402

# (hidden size, FFN hidden size, columns of the fused query, key and value projection) of scripts/models/.
MODELS = {"1.5B": (1536, 8960, 2048), "7B": (3584, 18944, 4608)}


LIMIT = 4e-3  # of the distance to the emulation: that of rounding the result to BF16 is 1.7e-3


@dataclass(frozen=True)
class Product:
    """out (m, n) = a (m, k) @ b (n, k)^T with one block shape per operand."""

    name: str
    m: int
    n: int
    k: int
    blocks: tuple[tuple[int, int], tuple[int, int]]


def products(model: str, tokens: int) -> Iterator[Product]:
    """fprop, dgrad and wgrad of each linear layer. Weight gradients contract over tokens: both operands are tiles."""
    hidden, ffn, qkv = MODELS[model]
    layers = {"qkv": (qkv, hidden), "proj": (hidden, hidden), "fc1": (2 * ffn, hidden), "fc2": (hidden, ffn)}
    for layer, (rows, columns) in layers.items():
        yield Product(f"{model} {layer} fprop", tokens, rows, columns, (ROW_BLOCK, WEIGHT_BLOCK))
        yield Product(f"{model} {layer} dgrad", tokens, columns, rows, (ROW_BLOCK, WEIGHT_BLOCK))
        yield Product(f"{model} {layer} wgrad", rows, columns, tokens, (ROW_BLOCK, ROW_BLOCK))


def cublas_scales(operand: BlockFP8) -> Tensor:
    """The scales in the memory order of cuBLASLt: those of tiles with the outer axis contiguous; those of blocks
    transposed, the contraction axis padded to a multiple of 4 (cuBLAS documentation, 1D and 2D block scaling).
    """
    if operand.block == ROW_BLOCK:
        return operand.scale_inv.t().contiguous().t()
    return F.pad(operand.scale_inv, (0, -operand.scale_inv.shape[1] % 4)).t()


def recipe(operand: BlockFP8) -> F.ScalingType:
    return F.ScalingType.BlockWise1x128 if operand.block == ROW_BLOCK else F.ScalingType.BlockWise128x128


def fp8_product(a: BlockFP8, b: BlockFP8) -> Callable[[], Tensor]:
    """The product as a function without arguments, so that laying out the scales is not timed."""
    codes = a.codes.view(torch.float8_e4m3fn), b.codes.view(torch.float8_e4m3fn).t()
    scales, recipes = (cublas_scales(a), cublas_scales(b)), (recipe(a), recipe(b))
    return lambda: F.scaled_mm(*codes, scales[0], recipes[0], scales[1], recipes[1], output_dtype=torch.bfloat16)


def milliseconds(functions: list[Callable[[], Tensor]], rounds: int, repeats: int = 10) -> list[float]:
    """Median time of each function over `rounds` in which they take turns, `repeats` calls each, on the GPU's clock."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, measured in zip(functions, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                function()
            end.record()
            end.synchronize()
            if number:  # the first round warms up
                measured.append(start.elapsed_time(end) / repeats)
    return [statistics.median(measured) for measured in times]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.float() - expected).norm() / expected.norm())


def agreement(name: str, found: Tensor, emulated: Tensor) -> float:
    """Distance of a product to its emulation. Ends the program where that is more than rounding."""
    apart = distance(found, emulated)
    if not apart < LIMIT:
        sys.exit(f"{name}: expected the emulated product up to {LIMIT}, found a relative distance of {apart:.1e}")
    return apart


def measure(product: Product, pow2: bool, rounds: int) -> tuple[str, float, float]:
    """(table row, BF16 ms, FP8 ms) of one product of normally distributed operands."""
    random = torch.Generator("cuda").manual_seed(0)
    shapes = (product.m, product.k), (product.n, product.k)
    x, y = (torch.randn(shape, device="cuda", generator=random).bfloat16() for shape in shapes)
    a, b = (block_fp8.quantize(z, block, pow2=pow2) for z, block in zip((x, y), product.blocks, strict=True))
    fp8 = fp8_product(a, b)
    bf16_ms, fp8_ms = milliseconds([lambda: x @ y.t(), fp8], rounds)
    emulated, exact = a.dequantize() @ b.dequantize().t(), x.float() @ y.float().t()
    tera = 2e-9 * product.m * product.n * product.k
    found = fp8()
    apart = agreement(product.name, found, emulated)
    row = (
        f"| {product.name} | {product.m} x {product.n} x {product.k} | {bf16_ms:.3f} | {tera / bf16_ms:.0f} "
        f"| {fp8_ms:.3f} | {tera / fp8_ms:.0f} | {bf16_ms / fp8_ms:.2f} "
        f"| {apart:.1e} | {distance(found, exact):.1e} |"
    )
    return row, bf16_ms, fp8_ms


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=8192, help="rows of the activations (%(default)s)")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")
    options.add_argument("--rounds", type=int, default=15, help="timed rounds (%(default)s)")
    options.add_argument("--output", type=Path, help="also write the tables here")
    args = options.parse_args()
    if args.tokens < BLOCK or args.tokens % BLOCK:
        sys.exit(f"--tokens: expected a multiple of {BLOCK}, found {args.tokens}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        sys.exit("fp8_gemm.py: expected a GPU with FP8 tensor cores (compute capability 9.0 or newer), found none")
    torch.backends.cuda.matmul.allow_tf32 = False  # the references are to be exact
    pow2 = block_fp8.power_of_two_scales()
    scales = "power-of-two" if pow2 else "float32"
    text = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {scales} scales\n\n"
    text += "| product | m x n x k | BF16 ms | TFLOP/s | FP8 ms | TFLOP/s | BF16 / FP8 | to emulation "
    text += "| to BF16 operands |\n|---|---|---|---|---|---|---|---|---|\n"
    print(text, end="")
    for model in args.models:
        total = [0.0, 0.0]
        for product in products(model, args.tokens):
            row, *times = measure(product, pow2, args.rounds)
            total = [before + now for before, now in zip(total, times, strict=True)]
            text += row + "\n"
            print(row, flush=True)
        row = f"| {model} all | | {total[0]:.3f} | | {total[1]:.3f} | | {total[0] / total[1]:.2f} | | |"
        text += row + "\n"
        print(row, flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    main()
