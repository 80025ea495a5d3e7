"""Intervals cover, equal models are seldom called different, pass@k is what drawing k samples gives."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import stats
from tests.conftest import REPO

SIMULATIONS = 1000
FEW = 1000  # resamples, for speed


def draws(generator: np.random.Generator, questions: int, samples: int, hard: float, easy: float) -> tuple:
    """Questions of a population, and what one run scores on them: ([Q] chance, [Q] score)."""
    chance = generator.beta(hard, easy, questions)
    return chance, generator.binomial(samples, chance) / samples


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(case):
    samples, right, k = case
    drawn = list(itertools.combinations([1] * right + [0] * (samples - right), k))
    assert stats.pass_at_k(samples, right, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


@pytest.mark.parametrize("case", [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_of_nonsense(case):
    with pytest.raises(ValueError, match="expected"):
        stats.pass_at_k(*case)


@pytest.mark.parametrize(
    ("questions", "samples", "hard", "easy"),
    [(30, 32, 0.6, 0.9), (30, 32, 2.0, 3.0), (198, 8, 1.0, 1.2), (167, 8, 0.7, 1.0)],
    ids=["aime", "aime, alike questions", "gpqa", "livecodebench"],
)
def test_coverage_of_the_interval(questions, samples, hard, easy):
    """The true mean of the population is inside in 93 to 97 % of simulated evaluations."""
    generator = np.random.default_rng(questions)
    truth, inside = hard / (hard + easy), 0
    for seed in range(SIMULATIONS):
        low, high = stats.interval(draws(generator, questions, samples, hard, easy)[1], seed=seed, resamples=FEW)
        inside += low <= truth <= high
    assert 0.93 <= inside / SIMULATIONS <= 0.97


@pytest.mark.parametrize("questions", [30, 198])
def test_equal_models_are_seldom_called_different(questions):
    """Two runs of one model on the same questions."""
    generator = np.random.default_rng(questions)
    called = 0
    for seed in range(SIMULATIONS):
        chance, first = draws(generator, questions, 8, 0.6, 0.9)
        second = generator.binomial(8, chance) / 8
        called += not stats.paired_difference(first, second, seed=seed, resamples=FEW).inside_noise
    assert called / SIMULATIONS <= 0.06


def test_a_real_difference_is_seen():
    """Pairing removes how hard the questions are: 5 points on 198 questions of very different difficulty."""
    generator = np.random.default_rng(1)
    chance = generator.beta(0.6, 0.9, 198) * 0.9
    first, second = generator.binomial(64, chance) / 64, generator.binomial(64, chance + 0.05) / 64
    found = stats.paired_difference(first, second)
    assert not found.inside_noise and 0.03 < found.value < 0.07 and found.low > 0
    assert found.error < 0.5 * math.hypot(stats.standard_error(first), stats.standard_error(second))


def test_errors_by_hand():
    scores = np.array([0.0, 0.5, 1.0, 0.5])
    assert stats.standard_error(scores) == pytest.approx(math.sqrt(0.5 / 3) / 2)
    # Two of four questions have a variance of 1/4 over n - 1 = 3.
    assert stats.sampling_error(scores, np.full(4, 4.0)) == pytest.approx(math.sqrt(2 * 0.25 / 3) / 4)
    assert math.isnan(stats.sampling_error(scores, np.ones(4)))


@pytest.mark.parametrize("scores", [[0.5], [0.0, 0.0, 0.0], [1.0, 1.0]])
def test_no_interval_where_nothing_varies(scores):
    assert all(map(math.isnan, stats.interval(np.array(scores))))


def test_equal_runs_differ_by_nothing():
    scores = np.array([0.1, 0.9, 0.4])
    found = stats.paired_difference(scores, scores.copy())
    assert found.value == 0.0 and found.inside_noise
    with pytest.raises(ValueError, match="the same questions, found 3 and 2"):
        stats.paired_difference(scores, scores[:2])


def test_more_everywhere_is_a_difference():
    """No interval, as all differences are equal, and yet not noise."""
    assert not stats.paired_difference(np.array([0.1, 0.2]), np.array([0.3, 0.4])).inside_noise


def test_the_documentation_says_how_many():
    table = (REPO / "docs" / "EVAL.md").read_text().partition("per-question differences | questions |")[2]
    rows = re.findall(r"^\| ([\d.]+) \| (\d+) \|$", table, re.MULTILINE)
    assert len(rows) == 3
    assert all(stats.questions_needed(0.01, float(spread)) == int(count) for spread, count in rows)


@pytest.mark.parametrize("spread", [0.2, 0.35])
def test_questions_needed(spread):
    """With so many questions a paired test finds the difference in about 80 % of the runs."""
    needed = stats.questions_needed(0.05, spread)
    generator = np.random.default_rng(3)
    found = 0
    for seed in range(400):
        change = generator.normal(0.05, spread, needed)
        found += not stats.paired_difference(np.zeros(needed), change, seed=seed, resamples=FEW).inside_noise
    assert 0.72 <= found / 400 <= 0.88
