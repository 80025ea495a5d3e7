"""GRPO's formulas: cases worked by hand, plain loops in float64, derivatives by finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.embedded.grpo import (
    Objective,
    clipped_loss,
    group_advantages,
    has_signal,
    kl_estimate,
    mismatch,
    policy_loss,
    reduction,
    token_log_probs,
)

# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 4.0]])
    found = group_advantages(rewards)
    # mean 1/2, unbiased deviation sqrt(4 * 1/4 / 3); all equal; mean 1, deviation sqrt((3 + 9) / 3) = 2
    half = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    expected = [[half, -half, -half, half], [0, 0, 0, 0], [-0.5, -0.5, -0.5, 1.5]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert group_advantages(rewards, normalize_std=False)[2].tolist() == [-1.0, -1.0, -1.0, 3.0]


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16), st.floats(0.5, 4), st.floats(-3, 3))
def test_advantages_are_centred_and_do_not_see_the_scale(rewards, factor, offset):
    x = torch.tensor([rewards], dtype=torch.float64)
    a = group_advantages(x)
    assert a.sum().abs() < 1e-6
    if x.std() > 1e-2:  # the 1e-6 beside the deviation is then nothing
        torch.testing.assert_close(group_advantages(x * factor + offset), a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rewards", "signal"), [([0, 0, 0], False), ([1, 1], False), ([1, 0, 0], True)])
def test_groups_without_signal(rewards, signal):
    assert has_signal(rewards) is signal


# ---------------------------------------------------------------- log-probabilities


def test_log_probs_and_entropy_by_hand():
    logits = torch.tensor([[math.log(1.0), math.log(3.0)], [0.0, 0.0]])
    log_probs, entropy = token_log_probs(logits, torch.tensor([1, 0]))
    assert log_probs.tolist() == pytest.approx([math.log(0.75), math.log(0.5)])
    by_hand = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy.tolist() == pytest.approx([by_hand, math.log(2)])
    # At temperature 2 the odds 3 : 1 become sqrt(3) : 1.
    hot, _ = token_log_probs(logits, torch.tensor([1, 0]), temperature=2.0)
    assert hot[0].item() == pytest.approx(math.log(math.sqrt(3) / (1 + math.sqrt(3))))


@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_unbiased_kl_estimates_have_the_right_mean(kind):
    """Summed over all tokens with their probabilities, the estimate is the divergence."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    assert (p * kl_estimate(p.log(), q.log(), kind)).sum().item() == pytest.approx(exact.item(), rel=1e-5)


def test_kl_estimates_by_hand():
    a, b = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    ratio = math.log(2)
    assert kl_estimate(a, b, "kl").item() == pytest.approx(ratio)
    assert kl_estimate(a, b, "k2").item() == pytest.approx(ratio**2 / 2)
    assert kl_estimate(a, b, "k3").item() == pytest.approx(0.5 - 1 + ratio)
    far = torch.tensor([-20.0])
    assert kl_estimate(far, torch.zeros(1), "low_var_kl").item() == 10.0
    assert kl_estimate(far, torch.zeros(1), "k3").item() > 1e8
    with pytest.raises(ValueError, match="k9"):
        kl_estimate(a, b, "k9")


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.25, 2.0, -2.5, 0.0),  # below 1.28: the raised upper bound leaves it alone
        (1.5, 2.0, -1.28 * 2, 1.0),
        (0.5, 2.0, -1.0, 0.0),  # a good token that became rarer keeps its gradient
        (0.5, -2.0, 0.8 * 2, 1.0),
        (1.5, -2.0, 3.0, 0.0),  # a bad token that became likelier keeps its gradient
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, clipped):
    found, was_clipped = clipped_loss(torch.tensor([math.log(ratio)]), torch.tensor([advantage]), Objective())
    assert found.item() == pytest.approx(loss) and was_clipped.item() == clipped


def test_reduction_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 5.0])
    masks = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0])]
    assert reduction([3, 2, 1], masks, per_token=False)(values).item() == 2.0 + 15.0
    assert reduction([3, 2, 1], masks, per_token=True)(values).item() == 4.0 + 30.0


@st.composite
def batches(draw) -> tuple[list[int], dict[str, np.ndarray], list[np.ndarray], Objective]:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = sum(lengths)
    old = rng.normal(-1.5, 0.7, count)
    data = {
        "log_probs": old + rng.normal(0, 0.3, count),
        "old": old,
        "rollout": old + rng.normal(0, 0.5, count),
        "reference": old + rng.normal(0, 0.5, count),
        "entropy": rng.uniform(0, 2, count),
        "advantages": np.repeat(rng.normal(0, 1, len(lengths)), lengths),
    }
    masks = [rng.integers(0, 2, length).astype(float) for length in lengths]
    objective = Objective(
        tis_clip=draw(st.sampled_from([None, 1.2, 2.0])),
        tis_clip_low=draw(st.sampled_from([0.0, 0.8])),
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
        kl_loss_coef=draw(st.sampled_from([0.0, 0.05])),
        kl_loss_type=draw(st.sampled_from(["kl", "k2", "k3", "low_var_kl"])),
    )
    return lengths, data, masks, objective


def by_loops(lengths, data, masks, o: Objective, per_token: bool) -> float:
    """The loss in plain Python, a token at a time."""
    total, position = 0.0, 0
    for length, mask in zip(lengths, masks, strict=True):
        pg = entropy = kl = 0.0
        for i in range(length):
            t = position + i
            if not mask[i]:
                continue
            a = data["advantages"][t]
            ratio = math.exp(data["log_probs"][t] - data["old"][t])
            bounded = min(max(ratio, 1 - o.eps_clip), 1 + o.eps_clip_high)
            token = max(-ratio * a, -bounded * a)
            if o.tis_clip is not None:
                weight = math.exp(data["old"][t] - data["rollout"][t])
                token *= min(max(weight, o.tis_clip_low), o.tis_clip)
            pg += token
            entropy += data["entropy"][t]
            d = data["log_probs"][t] - data["reference"][t]
            k3 = math.exp(-d) - 1 + d
            kl += {"kl": d, "k2": d * d / 2, "k3": k3, "low_var_kl": min(k3, 10.0)}[o.kl_loss_type]
        share = 1 if per_token else 1 / max(mask.sum(), 1)
        total += share * (pg - o.entropy_coef * entropy + o.kl_loss_coef * kl)
        position += length
    return total


def loss_of(lengths, data, masks, objective, per_token):
    tensors = {name: torch.from_numpy(values) for name, values in data.items()}
    tensors["log_probs"].requires_grad_()
    tensors["entropy"].requires_grad_()
    total, metrics = policy_loss(
        tensors["log_probs"],
        tensors["entropy"],
        old_log_probs=tensors["old"],
        advantages=tensors["advantages"],
        objective=objective,
        reduce=reduction(lengths, [torch.from_numpy(mask) for mask in masks], per_token=per_token),
        rollout_log_probs=tensors["rollout"],
        reference_log_probs=tensors["reference"],
    )
    return total, metrics, tensors


@settings(max_examples=80, deadline=None)
@given(batch=batches(), per_token=st.booleans())
def test_loss_equals_plain_loops_and_its_gradient_finite_differences(batch, per_token):
    lengths, data, masks, objective = batch
    total, metrics, tensors = loss_of(lengths, data, masks, objective, per_token)
    # kl_estimate works in float32, as slime does
    assert total.item() == pytest.approx(by_loops(lengths, data, masks, objective, per_token), rel=1e-5, abs=1e-5)
    assert metrics["loss"].item() == total.item() and not any(value.requires_grad for value in metrics.values())
    total.backward()
    if objective.kl_loss_coef:
        return  # float32 inside: no finite differences
    step = 1e-6
    for t in range(sum(lengths)):
        ratio = math.exp(data["log_probs"][t] - data["old"][t])
        if min(abs(ratio - 0.8), abs(ratio - 1.28)) < 1e-4:
            continue  # a corner
        sides = []
        for sign in (1, -1):
            moved = {**data, "log_probs": data["log_probs"].copy()}
            moved["log_probs"][t] += sign * step
            sides.append(by_loops(lengths, moved, masks, objective, per_token))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert tensors["log_probs"].grad[t].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_what_is_logged_by_hand():
    reduce = reduction([2], [torch.ones(2)], per_token=False)
    ratios, weights = torch.tensor([1.5, 1.0]), torch.tensor([4.0, 1.0])
    old = torch.tensor([-1.0, -2.0])
    _, metrics = policy_loss(
        old + ratios.log(),
        torch.tensor([0.5, 1.5]),
        old_log_probs=old,
        advantages=torch.tensor([1.0, 1.0]),
        objective=Objective(),
        reduce=reduce,
        rollout_log_probs=old - weights.log(),
    )
    expected = {
        "pg_clipfrac": 0.5,
        "ppo_kl": -math.log(1.5) / 2,
        "tis": 2.5,
        "ois": 1.25,
        "tis_clipfrac": 0.5,
        "pg_loss": (-1.28 * 2.0 - 1.0) / 2,
        "entropy_loss": 1.0,
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected)
    assert "kl_loss" not in metrics


def test_what_is_missing_is_named():
    x = torch.zeros(1)
    given_ = {"old_log_probs": x, "advantages": x, "reduce": reduction([1], [x], per_token=True)}
    with pytest.raises(ValueError, match="rollout"):
        policy_loss(x, x, objective=Objective(), **given_)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(x, x, objective=Objective(tis_clip=None, kl_loss_coef=0.1), **given_)


def test_the_truncated_weight_makes_the_expected_gradient_that_of_the_trainer():
    """Sampling from the rollout's policy and weighting by the ratio gives the trainer's policy gradient, where
    nothing is truncated: summed exactly over all tokens of a small vocabulary.
    """
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    rollout = torch.tensor([0.5, 0.2, 0.3])
    reward = torch.tensor([1.0, -1.0, 0.5])
    log_probs = torch.log_softmax(logits, 0)
    old = log_probs.detach()
    reduce = reduction([3], [rollout], per_token=True)  # the mask is the chance to be sampled
    total, _ = policy_loss(
        log_probs,
        torch.zeros(3),
        old_log_probs=old,
        advantages=reward,
        objective=Objective(tis_clip=100.0),
        reduce=reduce,
        rollout_log_probs=rollout.log(),
    )
    total.backward()
    p = old.exp()
    policy_gradient = p * (reward - (p * reward).sum())
    torch.testing.assert_close(logits.grad, -policy_gradient)


# ---------------------------------------------------------------- trainer against rollout


def test_mismatch_by_hand():
    train, rollout = torch.tensor([0.5, 0.2, 0.9]).log(), torch.tensor([0.4, 0.4, 0.1]).log()
    found = mismatch(train, rollout, torch.tensor([1, 1, 0]))
    assert found["mult_prob_error"] == pytest.approx((1.25 + 2.0) / 2, rel=1e-5)
    expected = (1.25 - 1 - math.log(1.25) + 0.5 - 1 - math.log(0.5)) / 2
    assert found["rollout_kl"] == pytest.approx(expected, rel=1e-5)
    assert mismatch(train, train, torch.ones(3)) == {"rollout_kl": 0.0, "mult_prob_error": 1.0}
    assert mismatch(train, rollout, torch.zeros(3)) == {"rollout_kl": 0.0, "mult_prob_error": 1.0}


def test_rollout_kl_has_the_right_mean():
    """Summed over tokens with the probabilities of the policy that samples, it is KL(rollout || trainer)."""
    rollout, train = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    each = [
        mismatch(t[None], r[None], torch.ones(1))["rollout_kl"] for t, r in zip(train.log(), rollout.log(), strict=True)
    ]
    exact = (rollout * (rollout / train).log()).sum().item()
    assert sum(r * value for r, value in zip(rollout.tolist(), each, strict=True)) == pytest.approx(exact, rel=1e-5)
