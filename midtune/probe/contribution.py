"""Layer contribution C(k) of arXiv 2607.01232, and how far position alone explains a ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence


def contribution(score: float, base: float, full: float, *, noise: float = 0.0) -> float | None:
    """C(k) = (S_k − S_base) / (S_full − S_base): the share of full training's gain that block k reaches.

    Args:
        score: S_k, the score after training block k alone.
        base: S_base, the score before training.
        full: S_full, the score after training every block.
        noise: the gain that full training must exceed to count, such as half the width of its interval.

    Returns:
        None where full training gained no more than `noise`: the ratio would mean nothing.
    """
    gain = full - base
    return (score - base) / gain if gain > max(noise, 0.0) else None


def depth_correlation(values: Sequence[float]) -> float | None:
    """Spearman correlation of `values`, one per block from 0 on, with minus depth: 1 if earlier is better."""
    return rank_correlation(values, [-float(k) for k in range(len(values))])


def middle_correlation(values: Sequence[float]) -> float | None:
    """Spearman correlation of `values`, one per block from 0 on, with closeness to the middle."""
    centre = (len(values) - 1) / 2
    return rank_correlation(values, [-abs(k - centre) for k in range(len(values))])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman correlation; None for fewer than three pairs or when one side is constant."""
    if len(first) < 3 or min(first) == max(first) or min(second) == max(second):
        return None
    from scipy.stats import spearmanr

    value = float(spearmanr(first, second).statistic)
    return value if math.isfinite(value) else None
