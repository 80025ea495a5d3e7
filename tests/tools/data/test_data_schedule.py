"""Rollouts and steps against slime's loop, played."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tools.data import DataError
from tools.data.schedule import Plan, schedule


def play(samples: int, plan: Plan) -> tuple[list[int], int]:
    """slime's train.py, without training: the rollouts after which it saves, and the number of rollouts.

    num_rollout_per_epoch is known to it only if --num-rollout is not given.
    """
    per_epoch = None if plan.num_rollout else samples // plan.rollout_batch_size
    rollouts = plan.num_rollout or plan.num_epoch * per_epoch
    saved = [
        rollout
        for rollout in range(rollouts)
        if plan.save_interval
        and ((rollout + 1) % plan.save_interval == 0 or (per_epoch and (rollout + 1) % per_epoch == 0))
    ]
    return saved, rollouts


@given(
    samples=st.integers(1, 200),
    batch=st.integers(1, 20),
    n=st.integers(1, 4),
    step=st.integers(1, 40),
    epochs=st.integers(1, 4),
    rollouts=st.none() | st.integers(1, 30),
    interval=st.none() | st.integers(1, 12),
)
def test_against_the_loop(samples, batch, n, step, epochs, rollouts, interval):
    assume(samples >= batch and batch * n % step == 0)
    plan = Plan(batch, step, n, epochs, rollouts, interval)
    saved, total = play(samples, plan)
    try:
        result = schedule(samples, plan, "f")
    except DataError:
        assert saved == [] or saved[0] == 0 or saved[-1] < total - 1 or interval == 1
        return
    assert result.rollouts == total
    assert result.samples_per_epoch == batch * result.rollouts_per_epoch <= samples
    assert result.epochs == pytest.approx(total * batch / samples)
    assert result.optimizer_steps * step == total * batch * n
    if interval:
        assert 0 not in saved and saved[-1] == total - 1


@pytest.mark.parametrize(
    ("samples", "plan", "says"),
    [
        (
            63,
            Plan(64),
            "f: expected at least --rollout-batch-size 64 samples, found 63: an epoch would have 0 rollouts",
        ),
        (
            99,
            Plan(64, 48),
            "--global-batch-size 48: expected a divisor of --rollout-batch-size 64 x --n-samples-per-pr",
        ),
        (99, Plan(64, 128), "--global-batch-size 128: expected a divisor of"),
        (99, Plan(8, num_epoch=1, save_interval=1), "--save-interval 1: expected at least 2"),
        (99, Plan(64, num_epoch=5, save_interval=9), "f: expected at least 2 rollouts per epoch, found 1"),
        (99, Plan(8, num_rollout=100, save_interval=30), "--save-interval 30: expected a divisor of --num-rollout 100"),
        (99, Plan(8, num_rollout=10, save_interval=20), "--save-interval 20: expected a divisor of --num-rollout 10"),
    ],
)
def test_what_would_break(samples, plan, says):
    with pytest.raises(DataError) as caught:
        schedule(samples, plan, "f")
    assert str(caught.value).startswith(says)


def test_numbers_of_the_recipes():
    sft = schedule(72_000, Plan(64, 64, 1, num_epoch=5, save_interval=1000), "f")
    assert (sft.samples_per_epoch, sft.rollouts_per_epoch, sft.rollouts, sft.optimizer_steps) == (
        72000,
        1125,
        5625,
        5625,
    )
    rl = schedule(17_398, Plan(128, 2048, 16, num_rollout=10240, save_interval=20), "f")
    assert (rl.samples_per_epoch, rl.rollouts_per_epoch, rl.optimizer_steps) == (17280, 135, 10240)
    assert rl.epochs == pytest.approx(75.34, abs=0.01)


def test_without_a_length_only_the_epoch_is_counted():
    result = schedule(100, Plan(10, 10), "f")
    assert result.rollouts_per_epoch == 10 and result.rollouts is result.epochs is result.optimizer_steps is None
