"""The linear layer of both precisions: BF16, and FP8 block scaling as TransformerEngine v2.4.0 computes it.

A linear layer is three matrix products, and each has two operands that FP8 quantises along its contraction axis:

    fprop   y  = x  w^T    contracts over inputs  (K): x in 1x128 tiles,              w in 128x128 blocks
    dgrad   dx = dy w      contracts over outputs (N): dy in 1x128 tiles,             the same codes of w
    wgrad   dw = dy^T x    contracts over tokens  (M): dy and x quantised once more, in 128x1 tiles, from BF16

(common/recipe/__init__.py:285-333 and pytorch/module/linear.py:292, 632, 744 of TE v2.4.0.) Only operands are FP8:
sums are float32, fprop and dgrad are rounded to BF16, the bias is added before that rounding, and wgrad is added to a
float32 main gradient (`weight.main_grad`), as Megatron's fused gradient accumulation does.

On a machine without FP8 units the operands are rounded to the values that FP8 can hold and multiplied in float32.
Products of two E4M3 numbers are exact there, so an emulated run differs from Hopper only in the order of the sums.
BF16 is the same layer with operands rounded to BF16, which they already are: the two runs share every other line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tools.checkpoint.block_fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, round_to_blocks


@dataclass(frozen=True)
class Precision:
    """How the operands of the matrix products are rounded.

    fp8: E4M3 block scaling if true, BF16 otherwise. pow2: FP8 scales are powers of two.
    """

    fp8: bool = False
    pow2: bool = True

    def operand(self, x: Tensor, block: tuple[int, int]) -> Tensor:
        """The matrix `x` (rows, columns) as the GEMM sees it, float32."""
        return round_to_blocks(x, block, pow2=self.pow2) if self.fp8 else x.float()

    @property
    def exact_in_bf16(self) -> bool:
        """Whether every operand is a BF16 number: 4 significant bits times a power of two are."""
        return not self.fp8 or self.pow2


def gemm(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """a (m, k) @ b (k, n) with float32 sums. Returns float32.

    A GPU multiplies in BF16 where that loses nothing, because its tensor cores sum BF16 products in float32. A CPU
    multiplies in float32: without AMX or AVX-512 BF16 units its BF16 product is about 8 times slower.
    """
    if a.is_cuda and precision.exact_in_bf16:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return a @ b


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, precision: Precision) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        y = gemm(precision.operand(tokens, ROW_BLOCK), operand.t(), precision)
        if bias is not None:
            y += bias.float()
        ctx.save_for_backward(tokens, weight, operand)
        ctx.precision, ctx.shape, ctx.has_bias = precision, x.shape, bias is not None
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor):
        tokens, weight, operand = ctx.saved_tensors
        precision = ctx.precision
        rows = dy.reshape(-1, dy.shape[-1])
        dx = gemm(precision.operand(rows, ROW_BLOCK), operand, precision).to(dy.dtype).view(ctx.shape)
        dw = gemm(precision.operand(rows, COLUMN_BLOCK).t(), precision.operand(tokens, COLUMN_BLOCK), precision)
        if hasattr(weight, "main_grad"):
            weight.main_grad += dw
            dw = None
        db = rows.float().sum(0) if ctx.has_bias else None
        return dx, dw, db, None, None


class Linear(nn.Linear):
    """nn.Linear whose matrix products follow `precision`; turned into from an nn.Linear by `convert`."""

    precision = Precision()
    _operand: tuple[int, Tensor] | None = None

    def operand(self) -> Tensor:
        """The weight as the GEMMs see it, (outputs, inputs) float32; rounded once per optimizer step."""
        version = self.weight._version
        if self._operand is None or self._operand[0] != version or self._operand[1].device != self.weight.device:
            self._operand = version, self.precision.operand(self.weight.detach(), WEIGHT_BLOCK)
        return self._operand[1]

    def use_operand(self, operand: Tensor) -> None:
        """Compute with weights that are rounded already, (outputs, inputs) float32, and not with `weight`."""
        self._operand = self.weight._version, operand.to(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return _LinearFunction.apply(x, self.weight, self.bias, self.operand(), self.precision)


def convert(model: nn.Module, precision: Precision, high_precision: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """Replace every nn.Linear of `model`; those named in `high_precision` compute in BF16, as Megatron's output layer.

    Returns the names of the layers that follow `precision`.
    """
    converted = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Linear
            keep = name.rsplit(".", 1)[-1] in high_precision
            module.precision = Precision() if keep else precision
            if not keep:
                converted.append(name)
    return converted


def weight_rounding(layers: Iterable[Linear]) -> tuple[int, float]:
    """(number of layers, relative error ||rounded - w|| / ||w|| of all their weights together)."""
    count, error, total = 0, 0.0, 0.0
    for layer in layers:
        weight = layer.weight.detach().float()
        count += 1
        error += (layer.operand() - weight).square().sum().item()
        total += weight.square().sum().item()
    return count, (error / total) ** 0.5 if total else 0.0


def describe(model: nn.Module, precision: Precision) -> str:
    """One line for the log; in FP8 with the measured rounding, so that a run shows that it was active."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    if not precision.fp8:
        return f"linear layers: {len(layers)} in BF16"
    count, error = weight_rounding(layer for layer in layers if layer.precision.fp8)
    scales = "power-of-two" if precision.pow2 else "float32"
    return (
        f"FP8 rounding: {count} of {len(layers)} linear layers in E4M3 blocks with {scales} scales; "
        f"it moves their weights by {error:.2%} (L2)"
    )
