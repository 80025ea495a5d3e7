"""The linear layer: which operands are quantised how, and the gradients that come out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.checkpoint.block_fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, quantize
from training.embedded.fp8_linear import Linear, Precision, convert, weight_rounding


def operands(pow2: bool, tokens: int, inputs: int, outputs: int):
    torch.manual_seed(tokens + inputs + outputs)
    layer = nn.Sequential(nn.Linear(inputs, outputs).bfloat16())
    assert convert(layer, Precision(fp8=True, pow2=pow2)) == ["0"]
    x = (torch.randn(tokens, inputs) * torch.logspace(-3, 2, inputs)).bfloat16().requires_grad_()
    dy = (torch.randn(tokens, outputs) * torch.logspace(1, -4, tokens)[:, None]).bfloat16()
    return layer[0], x, dy


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(128, 128, 256), (130, 300, 129), (3, 5, 1)])
def test_three_products_of_the_quantised_operands(pow2, tokens, inputs, outputs):
    """fprop, dgrad and wgrad equal float64 products of quantize(...).dequantize(), each along its contraction axis."""
    layer, x, dy = operands(pow2, tokens, inputs, outputs)

    def seen(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        return quantize(matrix.detach(), block, pow2=pow2).dequantize().double()

    y = layer(x)
    y.backward(dy)
    weight = seen(layer.weight, WEIGHT_BLOCK)
    expected = seen(x, ROW_BLOCK) @ weight.t() + layer.bias.detach().double()
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=expected.abs().max().item() * 1e-5)
    expected = seen(dy, ROW_BLOCK) @ weight
    torch.testing.assert_close(x.grad.double(), expected, rtol=2**-7, atol=expected.abs().max().item() * 1e-5)
    expected = seen(dy, COLUMN_BLOCK).t() @ seen(x, COLUMN_BLOCK)
    torch.testing.assert_close(
        layer.weight.grad.double(), expected, rtol=2**-7, atol=expected.abs().max().item() * 1e-5
    )
    torch.testing.assert_close(layer.bias.grad.float(), dy.float().sum(0), rtol=2**-7, atol=1e-5)


def test_main_grad_takes_the_weight_gradient_in_float32():
    layer, x, dy = operands(True, 16, 64, 32)
    layer(x).backward(dy)
    rounded = layer.weight.grad.clone()
    layer.weight.grad, layer.weight.main_grad = None, torch.zeros(32, 64)
    for _ in range(2):
        layer(x).backward(dy)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad / 2, rounded.float(), rtol=2**-7, atol=1e-6)
    assert not torch.equal(layer.weight.main_grad / 2, rounded.float())


def test_the_weight_is_rounded_again_after_an_optimizer_step():
    layer, x, _ = operands(True, 4, 8, 8)
    before = layer(x).detach()
    with torch.no_grad():
        torch._foreach_copy_([layer.weight], [torch.zeros(8, 8)])
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), layer.bias.expand(4, 8))


def test_the_output_layer_stays_in_bf16():
    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    assert convert(model, Precision(fp8=True)) == ["proj"]
    assert isinstance(model["lm_head"], Linear) and not model["lm_head"].precision.fp8


@pytest.mark.parametrize(("fp8", "expected"), [(True, True), (False, False)])
def test_weight_rounding_is_measured(fp8, expected):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(256, 256).bfloat16() for _ in range(2)])
    convert(model, Precision(fp8=fp8))
    count, error = weight_rounding(model)
    assert count == 2 and (0.01 < error < 0.04) is expected and (error == 0.0) is not expected
