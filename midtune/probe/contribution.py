"""Layer contribution C(k) of arXiv 2607.01232: its interval, which blocks may be best, where the curve is high.

Scores are [S, N]: S seeds, and N held-out problems, the same for every seed. The variance of their mean has a part
from seeds and one from problems, as in two-way analysis of variance with random effects. With one seed only problems
vary: the interval then covers these trained weights, not another run. A bootstrap over seeds would need more of
them: three seeds give only ten different samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midtune.report.statistics import CONFIDENCE, Estimate, t_quantile

DRAWS = 4000
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """A block among others scored on the same problems: the probability that it is the best of them.

    It is `among_best` if not told apart from the highest mean, at 95% over all comparisons together.
    """

    best_probability: float
    among_best: bool


def gain_interval(scores: ArrayLike, base: ArrayLike) -> Estimate:
    """Mean gain S_k − S_base over problems and seeds, from scores [S, N] after training and [N] before."""
    gains = np.atleast_2d(np.asarray(scores, dtype=float)) - np.asarray(base, dtype=float)
    value, margin = float(gains.mean()), _margin(gains)
    return Estimate(value, value - margin, value + margin)


def contribution_interval(scores: ArrayLike, base: ArrayLike, full: ArrayLike) -> Estimate | None:
    """C(k) = (S_k − S_base) / (S_full − S_base): the share of full training's gain that block k reaches.

    `scores` and `full` are [S, N], with the same seeds; `base` is [N]. The interval is Fieller's: all ratios c for
    which S_k − S_base − c (S_full − S_base) may be zero. None if full training's gain is not clearly above zero.
    """
    before = np.asarray(base, dtype=float)
    gain = np.atleast_2d(np.asarray(scores, dtype=float)) - before
    of_full = np.atleast_2d(np.asarray(full, dtype=float)) - before
    if of_full.mean() <= _margin(of_full):
        return None
    value = float(gain.mean()) / float(of_full.mean())

    def excess(c: float) -> float:
        """Positive if the ratio c is ruled out."""
        rest = gain - c * of_full
        return abs(float(rest.mean())) - _margin(rest)

    return Estimate(value, _crossing(excess, value, -1), _crossing(excess, value, 1))


def _margin(values: Scores) -> float:
    """Half the width of the interval of the mean of [S, N] values."""
    variance, freedom = mean_variance(values)
    return t_quantile(freedom) * math.sqrt(variance)


def mean_variance(values: Scores) -> tuple[float, float]:
    """Variance of the mean of [S, N] values over seeds and problems, and its degrees of freedom (Satterthwaite).

    The noise of single cells is in both parts, so it is subtracted once.
    """
    seeds, problems = values.shape
    mean = values.mean()
    by_problem = values.mean(0) - mean
    # Even if no problem differs, chance may have changed half of one.
    from_problems = max(float(by_problem @ by_problem) / (problems - 1) / problems, (0.5 / problems) ** 2)
    if seeds == 1:
        return from_problems, problems - 1
    by_seed = values.mean(1) - mean
    from_seeds = float(by_seed @ by_seed) / (seeds - 1) / seeds
    cells = values - mean - by_problem - by_seed[:, None]
    twice = float((cells**2).sum()) / ((seeds - 1) * (problems - 1)) / (seeds * problems)
    variance = max(from_seeds + from_problems - twice, from_problems, from_seeds)
    freedom = variance**2 / (from_seeds**2 / (seeds - 1) + from_problems**2 / (problems - 1))
    # The floor on the variance must not push this below the seeds' own.
    return variance, max(freedom, seeds - 1)


def standings(scores: Mapping[int, ArrayLike], confidence: float = CONFIDENCE) -> dict[int, Standing]:
    """Find which blocks may be the best, from scores [S, N] on the same problems and seeds.

    Only differences between blocks count, so a hard problem or a lucky seed cancels. Training noise is assumed equal
    for all blocks and estimated from all of them. With probability `confidence`, no block is told apart from one that
    is not better.
    """
    from scipy.stats import multivariate_t

    blocks = list(scores)
    values = np.stack([np.atleast_2d(np.asarray(scores[block], dtype=float)) for block in blocks])
    if len(blocks) == 1:
        return {blocks[0]: Standing(1.0, True)}
    means = values.mean((1, 2))
    covariance, freedom = _difference_covariance(values)
    drawn = multivariate_t(np.zeros(len(blocks)), covariance, df=freedom, allow_singular=True, seed=0)
    noise = np.asarray(drawn.rvs(DRAWS)).reshape(DRAWS, -1)
    best = np.bincount((means + noise).argmax(1), minlength=len(blocks)) / DRAWS
    spread = np.sqrt(np.maximum(np.diag(covariance)[:, None] + np.diag(covariance) - 2 * covariance, 1e-18))
    # The largest difference that noise alone makes anywhere, in standard errors: Tukey's range, correlated.
    largest = np.zeros(DRAWS)
    for first in range(len(blocks)):
        differences = np.abs(noise - noise[:, [first]]) / spread[first]
        differences[:, first] = 0
        largest = np.maximum(largest, differences.max(1))
    limit = float(np.quantile(largest, confidence))
    leader = int(means.argmax())
    behind = (means[leader] - means) / spread[leader]
    near = [i == leader or bool(behind[i] <= limit) for i in range(len(blocks))]
    return {block: Standing(float(best[i]), near[i]) for i, block in enumerate(blocks)}


def plateau(values: Mapping[int, float]) -> dict[str, float | None]:
    """The stretch of a curve, block → value, above half its height.

    `first` and `last` are the outermost blocks at or above the mean of the least and the greatest value; `inside` and
    `outside` are the mean value between them and elsewhere; `outside` is None if no block is.
    """
    half = (min(values.values()) + max(values.values())) / 2
    high = [block for block, value in values.items() if value >= half]
    first, last = min(high), max(high)
    inside = statistics.fmean(value for block, value in values.items() if first <= block <= last)
    others = [value for block, value in values.items() if not first <= block <= last]
    outside = statistics.fmean(others) if others else None
    return {"first": first, "last": last, "inside": inside, "outside": outside}


def _difference_covariance(values: Scores) -> tuple[Scores, float]:
    """Covariance [K, K] of the means of [K, S, N] scores, without what all K share; and its degrees of freedom."""
    blocks, seeds, problems = values.shape
    by_problem = values.mean(1) - values.mean((1, 2))[:, None]
    from_problems = by_problem @ by_problem.T / (problems - 1) / problems
    from_problems += np.eye(blocks) * (0.5 / problems) ** 2
    if seeds == 1:
        return from_problems, problems - 1
    # A run's mean less its block and seed effects is training noise plus the noise of its cells.
    by_seed = values.mean(2)
    rest = by_seed - by_seed.mean(1, keepdims=True) - by_seed.mean(0) + by_seed.mean()
    freedom_of_runs = (blocks - 1) * (seeds - 1)
    cells = values - by_problem[:, None] - by_seed[:, :, None]
    cells -= cells.mean(0)
    of_cells = float((cells**2).sum()) / freedom_of_runs / (problems - 1)
    training = max(float((rest**2).sum()) / freedom_of_runs - of_cells / problems, 0.0) / seeds
    others = from_problems.sum() - np.trace(from_problems)
    of_difference = 2 * float(np.trace(from_problems) - others / (blocks - 1)) / blocks
    freedom = (of_difference + 2 * training) ** 2 / (
        of_difference**2 / (problems - 1) + (2 * training) ** 2 / freedom_of_runs
    )
    return from_problems + training * np.eye(blocks), freedom


def _crossing(excess: Callable[[float], float], inside: float, direction: int) -> float:
    """Where `excess` turns positive, searching from `inside` in one direction."""
    from scipy.optimize import brentq

    reach = 0.1
    while excess(inside + direction * reach) <= 0:
        reach *= 2
    return float(brentq(excess, inside, inside + direction * reach, xtol=1e-6))
