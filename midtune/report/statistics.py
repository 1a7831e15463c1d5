"""Scores and gains with 95% intervals over problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 9999
# Fewer problems give a bootstrap too few different samples; Student's t is used instead.
FEWEST_FOR_BOOTSTRAP = 8


@dataclass(frozen=True)
class Score:
    """A mean over `n` problems and its 95% interval; NaN bounds if the scores do not determine it."""

    score: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Estimate:
    """A value, such as a gain, and its 95% interval; NaN bounds if the scores do not determine it."""

    value: float
    low: float
    high: float


def score_interval(per_problem: ArrayLike) -> Score:
    """The mean of [n] scores and its 95% interval: Wilson for scores of 0 and 1, else a BCa bootstrap over problems.

    If all scores are one fractional value, the interval covers what problems unlike these could do to the mean.
    Average several samples of a problem first, since they are not independent.

    Raises:
        ValueError: no scores, or scores that are not finite.
    """
    scores = _checked(per_problem)
    mean, n = float(scores.mean()), scores.size
    if np.isin(scores, (0.0, 1.0)).all():
        from scipy.stats import binomtest

        interval = binomtest(int(scores.sum()), n).proportion_ci(CONFIDENCE, method="wilson")
        return Score(mean, float(interval.low), float(interval.high), n)
    within = scores.min() >= 0 and scores.max() <= 1
    smallest, largest = (0.0, 1.0) if within else (-math.inf, math.inf)
    return Score(mean, *_mean_interval(scores, smallest=smallest, largest=largest), n)


def paired_gain(before: ArrayLike, after: ArrayLike) -> Estimate:
    """The mean of `after - before`, each [n] in the same order, with its 95% interval (BCa bootstrap over problems).

    Raises:
        ValueError: different lengths, no scores, or scores that are not finite.
    """
    first, second = _checked(before), _checked(after)
    if first.size != second.size:
        raise ValueError(f"{first.size} scores before and {second.size} after are not of the same problems")
    differences = second - first
    both = np.concatenate([first, second])
    limit = 1.0 if both.min() >= 0 and both.max() <= 1 else math.inf
    return Estimate(float(differences.mean()), *_mean_interval(differences, smallest=-limit, largest=limit))


def pass_at_k(samples: int, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """The unbiased probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k), c is `correct`.

    A product of factors up to 1, so that nothing overflows (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples")
    counts = np.asarray(correct, dtype=np.int64)
    drawn = np.arange(k)
    # Each draw leaves one wrong sample fewer, until none is left.
    factors = np.maximum(samples - counts[:, None] - drawn, 0) / (samples - drawn)
    return np.asarray(1 - factors.prod(axis=1), dtype=np.float64)


def t_quantile(freedom: float) -> float:
    """Half the width of a 95% interval in standard errors, by Student's t."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def jaccard(first: ArrayLike, second: ArrayLike) -> float | None:
    """Of the problems that either solves ([n] booleans each), the share that both solve; None if there are none."""
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else None


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(
            f"scores must be finite numbers, one per problem, not an array of shape {scores.shape}"
        )
    return scores


def _mean_interval(values: NDArray[np.float64], *, smallest: float, largest: float) -> tuple[float, float]:
    """95% interval of the mean of values known to lie in [smallest, largest]."""
    from scipy.stats import bootstrap

    n, mean = values.size, float(values.mean())
    if np.ptp(values) < 1e-12:
        # No spread seen: with 97.5% confidence at most this share of all problems differs (Clopper-Pearson for
        # 0 of n), each by as much as the range allows.
        unseen = 1 - ((1 - CONFIDENCE) / 2) ** (1 / n)
        low, high = mean - unseen * (mean - smallest), mean + unseen * (largest - mean)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else (math.nan, math.nan)
    low = high = math.nan
    if n >= FEWEST_FOR_BOOTSTRAP:
        sizes = {"n_resamples": RESAMPLES, "batch": max(1, 10**6 // n)}
        settings = {"confidence_level": CONFIDENCE, "method": "BCa", "rng": np.random.default_rng(0)}
        found = bootstrap((values,), np.mean, **sizes, **settings).confidence_interval
        low, high = float(found.low), float(found.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        margin = t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
        low, high = mean - margin, mean + margin
    return max(low, smallest), min(high, largest)
