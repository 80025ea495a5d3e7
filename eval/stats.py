"""Statistics of repeated answers to questions.

A benchmark gives each of Q questions k sampled answers, right or wrong. The samples of one question are not independent
of each other: what generalises is the variation between questions, so errors and intervals resample questions
(Miller, "Adding Error Bars to Evals", arXiv:2411.00640). Scores are arrays of shape [Q]: the share of right ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Array = NDArray[np.float64]
RESAMPLES = 10_000


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of Chen et al., arXiv:2107.03374, eq. 1. Raises ValueError for k > samples.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"expected 1 <= k <= {samples} samples and at most as many right, found k={k}, right={right}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def standard_error(scores: Array) -> float:
    """Of the mean over questions; nan for a single one."""
    return float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan


def sampling_error(scores: Array, samples: Array) -> float:
    """Standard error for other samples of the same questions: the binomial variance within each question."""
    if (samples < 2).any():
        return math.nan
    within = scores * (1.0 - scores) / (samples - 1.0)
    return float(np.sqrt(within.sum()) / len(scores))


def interval(scores: Array, *, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Bootstrap interval of the mean over questions, the percentiles widened for few questions.

    Plain percentiles of 30 questions are too narrow: they use n where the variance needs n - 1, and the normal where
    the mean of few has Student's distribution. Both are corrected by taking percentiles further out (Hesterberg, "What
    Teachers Should Know about the Bootstrap", arXiv:1411.5279, section 5.3). Equal scores give no interval: nan.
    """
    count = len(scores)
    if count < 2 or np.ptp(scores) == 0.0:
        return math.nan, math.nan
    outer = math.sqrt(count / (count - 1)) * t.ppf(0.5 - level / 2, count - 1)
    tail = norm.cdf(outer)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(count, np.full(count, 1.0 / count), size=resamples)
    means = weights @ scores / count
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Of two runs on the same questions: second minus first, its standard error and interval."""

    questions: int
    value: float
    error: float
    low: float
    high: float

    @property
    def inside_noise(self) -> bool:
        """The interval does not exclude 0. Two runs with equal scores everywhere differ by nothing."""
        return self.value == 0.0 or self.low <= 0.0 <= self.high


def paired_difference(first: Array, second: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Per-question differences remove what is common to both runs: how hard a question is."""
    if len(first) != len(second):
        raise ValueError(f"expected the same questions, found {len(first)} and {len(second)}")
    change = second - first
    low, high = interval(change, seed=seed, resamples=resamples)
    return Difference(len(change), float(change.mean()), standard_error(change), low, high)


def questions_needed(difference: float, spread: float, power: float = 0.8, level: float = 0.95) -> int:
    """Questions at which a paired comparison shows `difference` with this power; `spread`: standard deviation of the
    per-question differences.
    """
    return math.ceil(((norm.ppf(0.5 + level / 2) + norm.ppf(power)) * spread / difference) ** 2)
