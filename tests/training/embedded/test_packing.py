"""Packed rows: which samples share one, and that every sample is computed as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.embedded import tiny
from training.embedded import attention, fp8_linear, optimization, packing
from training.embedded.model import build

CPU = torch.device("cpu")

# ---------------------------------------------------------------- micro batches


def first_fit(lengths: list[int], limit: int) -> int:
    """get_minimum_num_micro_batch_size of slime/utils/data.py, in words: into the first batch with room."""
    batches: list[int] = []
    for length in lengths:
        room = [number for number, used in enumerate(batches) if used + length <= limit]
        if room:
            batches[room[0]] += length
        else:
            batches.append(length)
    return len(batches)


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 500))
def test_micro_batches_are_a_balanced_partition_as_many_as_first_fit(lengths, limit):
    batches = packing.micro_batches(lengths, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == first_fit(lengths, limit) and all(batches)
    assert all(batch == sorted(batch) for batch in batches)
    loads = [sum(lengths[index] for index in batch) for batch in batches]
    # The fullest got its last sample when it was the emptiest, and its samples came in order of length.
    fullest = max(range(len(batches)), key=loads.__getitem__)
    assert loads[fullest] - min(loads) <= min(lengths[index] for index in batches[fullest])


@given(LENGTHS, st.integers(1, 500))
def test_micro_batches_depend_on_nothing_else(lengths, limit):
    assert packing.micro_batches(lengths, limit) == packing.micro_batches(tuple(lengths), limit)


def test_micro_batches_by_hand():
    assert packing.micro_batches([5], 3) == [[0]]  # longer than the limit: on its own
    assert packing.micro_batches([4, 4, 4, 4], 8) == [[0, 2], [1, 3]]
    # First-fit needs two, of 9 and 1 tokens; balanced they hold 6 and 4.
    assert packing.micro_batches([3, 3, 3, 1], 9) == [[0, 2], [1, 3]]


# ---------------------------------------------------------------- the row


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=70), min_size=1, max_size=6))
def test_a_pack_holds_every_token_with_its_position(samples):
    packed = packing.pack(samples, CPU)
    tokens = [token for sample in samples for token in sample]
    filling = -len(tokens) % 128
    assert packed.tokens.tolist() == [tokens + [packing.PAD_TOKEN] * filling]
    positions = [position for sample in samples for position in range(len(sample))]
    assert packed.positions.tolist() == [positions + [0] * filling]
    assert packed.lengths == tuple(map(len, samples))
    for number, sample in enumerate(samples):
        assert packed.real[number].tolist() == [True] * len(sample) + [False] * (packed.real.shape[1] - len(sample))
        assert packed.tokens[0][packed.gather[number]][packed.real[number]].tolist() == sample


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)), min_size=1, max_size=6))
def test_response_rows_predict_the_response(sizes):
    lengths = [length for length, _ in sizes]
    responses = [min(response, length - 1) for length, response in sizes]
    row = [(sample, place) for sample, length in enumerate(lengths) for place in range(length)]
    expected = [
        (sample, place - 1)  # the logits one place earlier
        for sample, (length, response) in enumerate(zip(lengths, responses, strict=True))
        for place in range(length - response, length)
    ]
    rows = packing.response_rows(lengths, responses, CPU)
    assert rows.dtype == torch.int64 and [row[index] for index in rows.tolist()] == expected


# ---------------------------------------------------------------- the model


def model_of(groups: int, *, fp8: bool = False, pow2: bool = True):
    """A model that sees packs, with main gradients."""
    args = tiny.parse(tiny.argv(Path("/nowhere"), "--num-query-groups", groups))
    built = build(args, tiny.ROWS, CPU, fp8_linear.Precision(fp8=fp8, pow2=pow2))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(".bias"):  # Megatron starts them at zero, where a mistake would not show
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    built.set_attn_implementation(packing.ATTENTION)
    return built, optimization.MainParamOptimizer(built, args)


def samples_of(lengths: list[int]) -> list[list[int]]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, tiny.ROWS, (length,), generator=random).tolist() for length in lengths]


def alone(built, sample: list[int]) -> Tensor:
    """Logits of a sample by transformers' own attention, without a pack. Returns (length, vocabulary) float32."""
    built.set_attn_implementation(attention.WIDE)
    found = built(input_ids=torch.tensor([sample]), use_cache=False).logits[0].float()
    built.set_attn_implementation(packing.ATTENTION)
    return found


def gradients(optimizer) -> dict[str, Tensor]:
    found = {n: main.grad.clone() for n, main in zip(optimizer.names, optimizer.main, strict=True)}
    torch._foreach_zero_([main.grad for main in optimizer.main])
    return found


def both(lengths: list[int], groups: int, *, fp8: bool, pow2: bool = True):
    """(logits, gradients) of the pack and of each sample by itself, the loss being the same sum."""
    built, optimizer = model_of(groups, fp8=fp8, pow2=pow2)
    samples = samples_of(lengths)
    packed = packing.pack(samples, CPU)
    weights = torch.randn(sum(lengths), tiny.ROWS, generator=torch.Generator().manual_seed(7))
    together = packing.logits(built, packed, torch.arange(sum(lengths)))
    (torch.log_softmax(together, -1) * weights).sum().backward()
    packed_gradients = gradients(optimizer)
    pieces = []
    for sample, part in zip(samples, weights.split(lengths), strict=True):
        pieces.append(alone(built, sample))
        (torch.log_softmax(pieces[-1], -1) * part).sum().backward()
    return (together.detach(), packed_gradients), (torch.cat(pieces).detach(), gradients(optimizer))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


WHOLE_TILES, UNEVEN = [128, 256, 128], [1, 77, 128, 3, 40]
# Behind the last attention: what BF16 rounding of attention gradients does to FP8 codes does not reach these.
LAST = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate", "down")]


@pytest.mark.parametrize("groups", [1, 2], ids=["GQA", "MHA"])
@pytest.mark.parametrize("lengths", [WHOLE_TILES, UNEVEN], ids=["whole tiles", "uneven"])
def test_a_pack_in_bf16_is_each_sample_by_itself(lengths, groups):
    (logits, packed), (expected, single) = both(lengths, groups, fp8=False)
    assert relative(logits, expected) < 0.01
    assert max(relative(packed[name], gradient) for name, gradient in single.items()) < 0.02


@pytest.mark.parametrize("groups", [1, 2], ids=["GQA", "MHA"])
@pytest.mark.parametrize("lengths", [WHOLE_TILES, UNEVEN], ids=["whole tiles", "uneven"])
@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "fp32"])
def test_a_pack_in_fp8_is_each_sample_by_itself(lengths, groups, pow2):
    """Tiles of activations lie along a token, so that none sees its neighbours. Those of the weight gradient are 128
    tokens high: they are the same where samples fill whole ones. Where they are not, a scale that is a power of two
    does not move a code (unless it underflows); a float32 scale does, within FP8's error.
    """
    (logits, packed), (expected, single) = both(lengths, groups, fp8=True, pow2=pow2)
    assert relative(logits, expected) < 0.02
    differences = {name: relative(packed[name], gradient) for name, gradient in single.items()}
    assert max(differences.values()) < 0.1
    shared = lengths == UNEVEN and not pow2
    for name in LAST:
        assert (0.005 < differences[name]) is shared and differences[name] < 0.05, name


def test_what_fills_the_row_up_changes_nothing():
    """130 tokens become a row of 256: other tokens in the filling give bit for bit the same logits and gradients."""
    built, optimizer = model_of(1)
    packed = packing.pack(samples_of([100, 30]), CPU)
    found = []
    for token in (0, 9):
        packed.tokens[0, 130:] = token
        logits = packing.logits(built, packed, torch.arange(130))
        logits.square().sum().backward()
        found.append((logits.detach(), gradients(optimizer)))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=0, atol=0, msg=name)


def test_a_sample_does_not_see_the_others():
    built, _ = model_of(1)
    first, second, third = samples_of([20, 30, 10])
    with torch.no_grad():
        before = packing.logits(built, packing.pack([first, second, third], CPU), torch.arange(60))
        changed = [token % 30 + 1 for token in second]
        after = packing.logits(built, packing.pack([first, changed, third], CPU), torch.arange(60))
    assert torch.equal(before[:20], after[:20]) and torch.equal(before[50:], after[50:])
    assert not torch.equal(before[20:50], after[20:50])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 2))
def test_attention_is_causal_attention_of_each_sample(lengths, groups):
    """In float64 against plain matrix products."""
    torch.manual_seed(sum(lengths))
    packed = packing.pack(samples_of(lengths), CPU)
    row = packed.tokens.shape[1]
    query = torch.randn(1, 2, row, 8, dtype=torch.float64)
    key, value = (torch.randn(1, groups, row, 8, dtype=torch.float64) for _ in range(2))
    found, _ = packing.attention(None, query, key, value, None, pack=packed, scaling=8**-0.5)
    start = 0
    for length in lengths:
        q, k, v = (x[0, :, start : start + length] for x in (query, key, value))
        k, v = (x.repeat_interleave(2 // groups, 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(
            torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf
        )
        expected = (scores.softmax(-1) @ v).transpose(0, 1)
        torch.testing.assert_close(found[0, start : start + length], expected)
        start += length
    assert not found[0, start:].any()
