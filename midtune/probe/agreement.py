"""How far two rankings agree, or one and position: rank correlations, and overlap of the best blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midtune.probe.selection import best_first

# 97.5% quantile of the normal distribution.
Z = 1.959964
# Kendall's interval divides by n − 4.
FEWEST_FOR_INTERVAL = 5


@dataclass(frozen=True)
class Correlation:
    """A rank correlation and its 95% interval; bounds are None if undefined."""

    value: float
    low: float | None
    high: float | None


def spearman(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Spearman's rho; its standard error on Fisher's scale is sqrt((1 + ρ²/2) / (n − 3)) (Bonett & Wright 2000).

    None for fewer than three pairs or a constant side. No bounds for fewer than five pairs, or at ±1, where
    Fisher's scale ends.
    """
    from scipy.stats import spearmanr

    return _correlation(spearmanr, first, second, lambda rho, n: (1 + rho**2 / 2) / (n - 3))


def kendall(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Kendall's tau-b; its standard error on Fisher's scale is sqrt(0.437 / (n − 4)) (Fieller, Hartley & Pearson 1957).

    None, or no bounds, as in `spearman`.
    """
    from scipy.stats import kendalltau

    return _correlation(kendalltau, first, second, lambda tau, n: 0.437 / (n - 4))


def depth_correlation(values: Mapping[int, float]) -> Correlation | None:
    """Spearman correlation of block → value with minus depth: 1 if an earlier block is always better."""
    return spearman(list(values.values()), [-float(block) for block in values])


def middle_correlation(values: Mapping[int, float], num_blocks: int) -> Correlation | None:
    """Spearman correlation of block → value with closeness to the middle of the model."""
    return spearman(list(values.values()), [-abs(block - (num_blocks - 1) / 2) for block in values])


def top_overlap(first: Sequence[float], second: Sequence[float], k: int) -> dict[str, float]:
    """How many blocks are among the best k of both rankings (`overlap`; ties go to the deeper block).

    `expected` is what chance gives, and `p` the probability that chance gives at least `overlap`.
    """
    from scipy.stats import hypergeom

    n = len(first)
    one, other = (best_first(dict(enumerate(values)))[:k] for values in (first, second))
    shared = len({*one} & {*other})
    return {"overlap": shared, "expected": k * k / n, "p": float(hypergeom.sf(shared - 1, n, k, k))}


def at_relative_depths(values: Mapping[int, float], num_blocks: int, wanted: int) -> dict[int, float]:
    """Interpolate block → value of `num_blocks` blocks at the relative depths k/(L−1) of a model with `wanted`, fewer.

    Interpolation is linear; a block whose neighbour was not ranked gets no value.
    """
    import numpy as np

    known = [values.get(block, math.nan) for block in range(num_blocks)]
    places = np.arange(wanted) * (num_blocks - 1) / max(wanted - 1, 1)
    found = np.interp(places, np.arange(num_blocks), known).tolist()
    return {block: value for block, value in enumerate(found) if not math.isnan(value)}


def _correlation(
    measure: Callable[..., Any],
    first: Sequence[float],
    second: Sequence[float],
    variance: Callable[[float, int], float],
) -> Correlation | None:
    """`variance` is that of Fisher's z = atanh(value)."""
    n = len(first)
    if n < 3 or min(first) == max(first) or min(second) == max(second):
        return None
    value = float(measure(first, second).statistic)
    if abs(value) > 1 - 1e-9:
        return Correlation(math.copysign(1.0, value), None, None)
    if n < FEWEST_FOR_INTERVAL:
        return Correlation(value, None, None)
    centre, margin = math.atanh(value), Z * math.sqrt(variance(value, n))
    return Correlation(value, math.tanh(centre - margin), math.tanh(centre + margin))
