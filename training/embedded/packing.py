"""Samples of different lengths in one micro batch, without padding between them.

Samples lie one after another in a single row of tokens, as slime packs them (get_batch,
slime/backends/megatron_utils/data.py at 8359c9a); linear layers see the row, attention sees each sample by itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.embedded.attention import causal

ALIGNMENT = 128  # slime pads a row to a multiple of it; it is also the height of wgrad's FP8 tiles
PAD_TOKEN = 0
ATTENTION = "packed"


def micro_batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of the samples of each micro batch.

    As many as first-fit into `limit` tokens needs (get_minimum_num_micro_batch_size, slime/utils/data.py), then
    balanced, longest sample first: so one may hold somewhat more than `limit`, and a sample that is longer than it is
    on its own.
    """
    fits: list[int] = []
    for length in lengths:
        for number, used in enumerate(fits):
            if used + length <= limit:
                fits[number] += length
                break
        else:
            fits.append(length)
    loads = [(0, number) for number in range(len(fits))]
    batches: list[list[int]] = [[] for _ in fits]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, number = heapq.heappop(loads)
        batches[number].append(index)
        heapq.heappush(loads, (load + lengths[index], number))
    return [sorted(batch) for batch in batches]


@dataclass(frozen=True)
class Pack:
    """Samples in one row.

    tokens, positions: (1, row) int64, the row filled up to a multiple of 128. lengths: of the samples. gather:
    (samples, longest) int64, the place in the row of each token of each sample, 0 where a sample is shorter; real: the
    same shape, true where it is not.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    gather: Tensor
    real: Tensor


def pack(samples: Sequence[Sequence[int]], device: torch.device) -> Pack:
    """Put token sequences into one row."""
    lengths = torch.tensor([len(sample) for sample in samples])
    row = int(lengths.sum())
    padded = -(-row // ALIGNMENT) * ALIGNMENT
    tokens = torch.full((1, padded), PAD_TOKEN, dtype=torch.int64)
    tokens[0, :row] = torch.tensor([token for sample in samples for token in sample], dtype=torch.int64)
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    gather = torch.where(real, starts[:, None] + columns, 0)
    positions = torch.zeros_like(tokens)
    positions[0, :row] = columns.expand_as(real)[real]
    return Pack(tokens.to(device), positions.to(device), tuple(lengths.tolist()), gather.to(device), real.to(device))


def response_rows(lengths: Sequence[int], responses: Sequence[int], device: torch.device) -> Tensor:
    """(sum of responses,) int64: the places in the row whose logits predict the tokens of each sample's response."""
    rows, end = [], 0
    for length, response in zip(lengths, responses, strict=True):
        end += length
        rows.append(torch.arange(end - response - 1, end - 1))
    return torch.cat(rows).to(device)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, pack: Pack, **settings
) -> tuple[Tensor, None]:
    """Causal attention within each sample of `pack`; what fills the row up attends to nothing and gives zeros.

    query: (1, heads, row, head_dim); key, value: (1, groups, row, head_dim). Returns (1, row, heads, head_dim).
    """
    query, key, value = (x[0].transpose(0, 1)[pack.gather].transpose(1, 2) for x in (query, key, value))
    # Samples are left-aligned: what lies behind the end of a shorter one is in nobody's past.
    out = causal(query, key, value, settings["scaling"])
    result = out.new_zeros(pack.tokens.shape[1], *out.shape[1::2])
    return result.index_put((pack.gather[pack.real],), out.transpose(1, 2)[pack.real])[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


def logits(model: Qwen2ForCausalLM, pack: Pack, rows: Tensor) -> Tensor:
    """Float32 logits of some places of the row. rows: (n,) int64. Returns (n, vocabulary).

    The model's attention must be `ATTENTION` (model.set_attn_implementation).
    """
    output = model(input_ids=pack.tokens, position_ids=pack.positions, use_cache=False, logits_to_keep=rows, pack=pack)
    return output.logits[0].float()
