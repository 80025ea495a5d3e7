"""Attention as transformers computes it with torch's fused kernel; on a CPU in float32.

Queries, keys and values are BF16 and so is the result, as on a GPU. Between them torch's CPU kernel multiplies in
BF16: without BF16 units that takes several times as long as float32 for a backward pass, and it is less exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WIDE = "wide"  # for model.set_attn_implementation


def widen(*operands: Tensor) -> list[Tensor]:
    """What the kernel is given: float32 for BF16 on a CPU, else the operands as they are."""
    return [x.float() if x.dtype == torch.bfloat16 and not x.is_cuda else x for x in operands]


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention. query: (batch, heads, length, head_dim); key, value: with groups for heads.

    Returns the shape and dtype of query.
    """
    gqa = query.shape[1] != key.shape[1]
    wide = widen(query, key, value)
    return F.scaled_dot_product_attention(*wide, is_causal=True, scale=scale, enable_gqa=gqa).to(query.dtype)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings
) -> tuple[Tensor, None]:
    """transformers' interface: returns (batch, length, heads, head_dim)."""
    out, _ = sdpa_attention_forward(module, *widen(query, key, value), mask, **settings)
    return out.to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(WIDE, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(WIDE, sdpa_mask)
