"""Attention on a CPU: float32 inside, so that BF16 rounds operands, results and gradients and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.training.embedded import tiny
from training.embedded import attention, fp8_linear
from training.embedded.model import build

SCALE = 0.125


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T scale) v in float64, by hand. mask: (length, keys) or (batch, 1, length, keys), true where seen."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def operands(batch: int, heads: int, groups: int, length: int, keys: int) -> list[Tensor]:
    """Random BF16 queries, keys and values."""
    random = torch.Generator().manual_seed(heads * keys)
    shapes = ((batch, heads, length, 64), (batch, groups, keys, 64), (batch, groups, keys, 64))
    return [torch.randn(shape, generator=random).bfloat16().requires_grad_() for shape in shapes]


def only_rounded(found: Tensor, wanted: Tensor) -> None:
    """BF16, and off by no more than half of its last place, and what float32 sums lose."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2.0**-8, atol=2e-6)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (14, 2)])
@pytest.mark.parametrize("way", ["causal", "transformers"])
def test_results_and_gradients_of_a_training_batch(way, heads, groups):
    given = operands(3, heads, groups, 65, 65)
    if way == "causal":
        out = attention.causal(*given, scale=SCALE)
    else:
        module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
        out, _ = ALL_ATTENTION_FUNCTIONS[attention.WIDE](module, *given, None, scaling=SCALE)
        out = out.transpose(1, 2)
    doubles = [x.detach().double().requires_grad_() for x in given]
    wanted = exact(*doubles, torch.ones(65, 65, dtype=torch.bool).tril())
    only_rounded(out, wanted)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    for ours, theirs in zip(
        torch.autograd.grad(out, given, upstream), torch.autograd.grad(wanted, doubles, upstream.double()), strict=True
    ):
        only_rounded(ours, theirs)


@pytest.mark.parametrize("length", [1, 20])
def test_left_padded_prompts_and_a_cache(length):
    """As generation calls it: a mask, and keys from before."""
    given = [x.detach() for x in operands(2, 4, 2, length, 20)]
    real = torch.tensor([[0] * 7 + [1] * 13, [1] * 20], dtype=torch.bool)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[-length:] & real[:, None, None]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    out, _ = ALL_ATTENTION_FUNCTIONS[attention.WIDE](module, *given, mask, scaling=SCALE)
    wanted = exact(*(x.double() for x in given), mask)
    seen = mask.any(-1).expand(2, 4, length)  # of what fills a row up nobody reads the result
    only_rounded(out.transpose(1, 2)[seen], wanted[seen])


def test_pre_training_uses_it():
    args = tiny.parse(tiny.argv(Path("/nowhere")))
    built = build(args, tiny.ROWS, torch.device("cpu"), fp8_linear.Precision(fp8=True))
    assert built.config._attn_implementation == attention.WIDE
    assert ALL_ATTENTION_FUNCTIONS[attention.WIDE] is attention._attention
