"""Sampling: what is drawn, its log-probability, where it ends, and that no response depends on its neighbours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.training.embedded import tiny
from training.embedded import fp8_linear
from training.embedded.generation import Response, Sampling, _restrict, draw, generate, seed_of
from training.embedded.model import build

PROMPTS = [[3, 10, 4], [5], [10, 11, 12, 13, 14, 15, 16], [9, 9]]


def model_of(*, fp8: bool = False, dtype: torch.dtype = torch.float32):
    """Random weights. In float32 a cached and a whole forward pass agree in every choice."""
    args = tiny.parse(tiny.argv(Path("/nowhere")))
    built = build(args, tiny.ROWS, torch.device("cpu"), fp8_linear.Precision(fp8=fp8, pow2=False))
    return built.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return model_of()


def whole(model, tokens: list[int]) -> Tensor:
    """Log-probabilities of the next token after every token, by one forward pass. Returns (length, vocabulary)."""
    return torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float(), -1)


def by_argmax(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, a whole forward pass for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(whole(model, tokens)[-1].argmax().item())
    return tokens[len(prompt) :]


def greedy(model, prompts: list[list[int]], count: int = 12, stop: tuple[int, ...] = ()) -> list[Response]:
    return generate(model, prompts, Sampling(0.0, max_new_tokens=count, stop=stop), seed=0)


# ---------------------------------------------------------------- against whole forward passes


def test_greedy_is_the_argmax_of_whole_forward_passes(model):
    for prompt, response in zip(PROMPTS, greedy(model, PROMPTS), strict=True):
        assert response.tokens == by_argmax(model, prompt, 12)
        assert response.truncated and len(response.log_probs) == 12


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probs_are_those_of_a_whole_forward_pass(model, temperature):
    sampling = Sampling(temperature, top_p=0.8, top_k=6, max_new_tokens=10)  # which the log-probabilities do not see
    for prompt, response in zip(PROMPTS, generate(model, PROMPTS, sampling, seed=3), strict=True):
        scores = model(input_ids=torch.tensor([prompt + response.tokens]), use_cache=False).logits[0]
        expected = torch.log_softmax(scores / temperature, -1)[len(prompt) - 1 : -1]
        expected = expected.gather(-1, torch.tensor(response.tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_greedy_log_probs_are_those_of_temperature_1(model):
    (response,) = greedy(model, PROMPTS[:1])
    expected = whole(model, PROMPTS[0] + response.tokens)[len(PROMPTS[0]) - 1 : -1].max(-1).values
    torch.testing.assert_close(torch.tensor(response.log_probs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_in_low_precision_it_agrees_up_to_rounding(fp8):
    model = model_of(fp8=fp8, dtype=torch.bfloat16)
    for prompt, response in zip(PROMPTS, greedy(model, PROMPTS), strict=True):
        scores = whole(model, prompt + response.tokens)[len(prompt) - 1 : -1]
        chosen = scores.gather(-1, torch.tensor(response.tokens)[:, None]).squeeze(-1)
        assert (scores.max(-1).values - chosen).max() < 0.2
        assert (torch.tensor(response.log_probs) - chosen).abs().mean() < 0.1


# ---------------------------------------------------------------- where a response ends


def test_a_stop_token_is_the_last_one(model):
    (free,) = greedy(model, PROMPTS[:1])
    place = next(n for n, token in enumerate(free.tokens) if n and token not in free.tokens[:n])
    (stopped,) = greedy(model, PROMPTS[:1], stop=(free.tokens[place],))
    assert stopped.tokens == free.tokens[: place + 1] and not stopped.truncated
    assert stopped.log_probs == pytest.approx(free.log_probs[: place + 1], abs=1e-5)
    # The first of several, in whatever order they are given.
    (several,) = greedy(model, PROMPTS[:1], stop=(free.tokens[place], 31, free.tokens[0]))
    assert several.tokens == free.tokens[:1] and not several.truncated


def test_a_stop_token_in_the_last_place_is_not_cut_off(model):
    (free,) = greedy(model, PROMPTS[:1])
    place = next(n for n, token in enumerate(free.tokens) if n and token not in free.tokens[:n])
    (just,) = greedy(model, PROMPTS[:1], count=place + 1, stop=(free.tokens[place],))
    assert len(just.tokens) == place + 1 and not just.truncated
    (cut,) = greedy(model, PROMPTS[:1], count=place, stop=(free.tokens[place],))
    assert cut.tokens == free.tokens[:place] and cut.truncated


def test_the_prompt_may_hold_a_stop_token(model):
    assert len(greedy(model, [[7, 7]], count=3, stop=(7,))[0].log_probs) >= 1


# ---------------------------------------------------------------- one response and the others


def test_a_greedy_response_depends_on_its_prompt_alone(model):
    together = greedy(model, PROMPTS)
    assert [greedy(model, [prompt])[0].tokens for prompt in PROMPTS] == [response.tokens for response in together]
    back = greedy(model, PROMPTS[::-1])[::-1]
    assert [response.tokens for response in back] == [response.tokens for response in together]


def test_finished_responses_leave_the_batch_and_change_nothing(model):
    """Forward passes get smaller; what goes on is what it would have been alone."""
    alone = {tuple(prompt): greedy(model, [prompt], count=30)[0] for prompt in PROMPTS}
    prompts = [PROMPTS[n % 4] for n in range(12)]
    first = {greedy(model, [prompt], count=1)[0].tokens[0] for prompt in PROMPTS[:2]}
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = generate(model, prompts, Sampling(0.0, max_new_tokens=30, stop=tuple(first)), seed=0)
    hook.remove()
    assert sizes[0] == 12 and sizes[-1] < 12 and sizes == sorted(sizes, reverse=True)
    for prompt, response in zip(prompts, found, strict=True):
        expected = alone[tuple(prompt)].tokens
        end = next((n + 1 for n, token in enumerate(expected) if token in first), 30)
        assert response.tokens == expected[:end] and response.truncated == (expected[end - 1] not in first)
        assert len(response.log_probs) == end


# ---------------------------------------------------------------- seeds


def test_the_seed_decides(model):
    def texts(seed: int) -> list[list[int]]:
        return [response.tokens for response in generate(model, PROMPTS, Sampling(max_new_tokens=20), seed)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = texts(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert texts(5) == first != texts(6)


def test_seeds_depend_on_every_part():
    parts = [(1, 2, 3), (1, 3, 2), (1, 2), (12, 3), (1, 23), (1, "eval", "a", 0), (1, "eval", "b", 0)]
    seeds = {seed_of(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)


def test_samples_of_one_prompt_differ(model):
    found = generate(model, [PROMPTS[0]] * 8, Sampling(temperature=1.5, max_new_tokens=20), seed=1)
    assert len({tuple(response.tokens) for response in found}) > 4


# ---------------------------------------------------------------- distributions


def by_sorting(probabilities: list[float], top_k: int, top_p: float) -> list[float]:
    """What may be drawn, in plain Python: the top_k likeliest, and of these the fewest that hold top_p of them."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    if top_k > 0:
        order = order[:top_k]
    total, held, kept = sum(probabilities[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        held += probabilities[token]
        if held >= top_p * total:
            break
    kept_total = sum(probabilities[token] for token in kept)
    return [p / kept_total if token in kept else 0.0 for token, p in enumerate(probabilities)]


@given(
    st.lists(st.integers(1, 10**6), min_size=2, max_size=12, unique=True),
    st.sampled_from([-1, 1, 2, 3, 5, 50]),
    st.integers(1, 99),
)
def test_top_k_and_top_p_keep_what_sorting_keeps(weights, top_k, percent):
    exact = [weight / sum(weights) for weight in weights]
    order = sorted(weights, reverse=True)[: top_k if top_k > 0 else None]
    held = [sum(order[: n + 1]) / sum(order) for n in range(len(order))]
    if min(abs(share - percent / 100) for share in held) < 1e-5:
        return  # where float32 decides
    sampling = Sampling(top_k=top_k, top_p=percent / 100)
    found = _restrict(torch.tensor([exact, exact[::-1]]), sampling)
    found = found / found.sum(-1, keepdim=True)
    for row, values in zip(found.tolist(), (exact, exact[::-1]), strict=True):
        assert row == pytest.approx(by_sorting(values, top_k, percent / 100), abs=1e-6)


def chi_square(sampling: Sampling, probabilities: list[float], logits: Tensor, draws: int = 10_000) -> float:
    """Pearson's statistic of the tokens drawn per degree of freedom, the mean of ten seeds: about 1 if they have these
    probabilities. Infinite if one was drawn that must not be.
    """
    total, degrees = 0.0, max(sum(probability > 0 for probability in probabilities) - 1, 1)
    for seed in range(10):
        tokens, _ = draw(logits.expand(draws, -1), sampling, torch.Generator().manual_seed(seed))
        for count, probability in zip(torch.bincount(tokens, minlength=len(probabilities)), probabilities, strict=True):
            if probability:
                total += (count.item() - draws * probability) ** 2 / (draws * probability)
            elif count:
                return math.inf
    return total / degrees / 10


LOGITS = torch.tensor([[0.3, -1.0, 2.0, 1.1, 0.0, -2.5, 1.7, 0.9]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (3, 1.0), (-1, 0.7), (5, 0.6), (1, 1.0)])
def test_frequencies_are_the_probabilities(temperature, top_k, top_p):
    exact = torch.softmax(LOGITS[0].double() / temperature, -1).tolist()
    sampling = Sampling(temperature, top_p, top_k)
    assert chi_square(sampling, by_sorting(exact, top_k, top_p), LOGITS) < 2.2  # by chance once in 5000
    if top_k == -1 and top_p == 1.0:  # the test can tell distributions apart
        other = torch.softmax(LOGITS[0].double() / (temperature * 1.1), -1).tolist()
        assert chi_square(sampling, other, LOGITS) > 4.0


def test_log_probs_of_a_draw_are_before_top_k_and_top_p():
    tokens, log_probs = draw(LOGITS.expand(50, -1), Sampling(2.0, 0.5, 4), torch.Generator().manual_seed(1))
    expected = torch.log_softmax(LOGITS[0] / 2.0, -1)[tokens]
    torch.testing.assert_close(log_probs, expected)
    tokens, log_probs = draw(LOGITS, Sampling(0.0), torch.Generator().manual_seed(1))
    assert tokens.item() == 2 and log_probs.item() == pytest.approx(torch.log_softmax(LOGITS[0], -1)[2].item())


def test_the_frequencies_of_responses(model):
    """Two-token responses to one prompt against the exact distribution of pairs, in a batch with another prompt."""
    pairs, count = 200, 1500
    prompts = [PROMPTS[0]] * count + [PROMPTS[2]]
    found = generate(model, prompts, Sampling(max_new_tokens=2), seed=9)[:count]
    first = whole(model, PROMPTS[0])[-1].exp()
    joint = torch.stack([first[t] * whole(model, [*PROMPTS[0], t])[-1].exp() for t in range(tiny.ROWS)]).flatten()
    seen = torch.bincount(
        torch.tensor([a * tiny.ROWS + b for a, b in (response.tokens for response in found)]), minlength=len(joint)
    )
    likely = joint.topk(pairs).indices
    likely = likely[joint[likely] * count > 5]
    statistic = ((seen[likely] - count * joint[likely]) ** 2 / (count * joint[likely])).mean().item()
    assert len(likely) > 10 and 0.3 < statistic < 1.8
