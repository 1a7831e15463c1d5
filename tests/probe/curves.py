"""Probes of which the truth is known: problems, runs and scores drawn at random around a curve by depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# C(0) to C(27) of Qwen3-1.7B in arXiv 2607.01232.
PUBLISHED = [
    *(0.89, 0.87, 1.03, 0.75, 0.77, 0.78, 0.87, 0.80, 0.72, 1.04, 1.14, 0.92, 1.12, 1.01),
    *(0.92, 0.95, 0.85, 0.83, 0.66, 0.52, 0.32, 0.40, 0.47, 0.32, 0.28, 0.35, 0.36, 0.54),
]  # fmt: skip
BLOCKS = 12
PLATEAU = [1.0] * 8 + [0.4] * 4
PEAK = [max(0.1, 1 - 0.25 * abs(block - 5)) for block in range(BLOCKS)]
FLAT = [0.8] * BLOCKS

BASE, FULL_GAIN = 0.3, 0.25
SPREAD = 1.2


@lru_cache
def _levels() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean success over all problems there could be, for a shift of every problem's log-odds."""
    every = np.random.default_rng(0).normal(0, SPREAD, 20_000)
    shifts = np.linspace(-6, 6, 400)
    return np.array([_success(shift + every).mean() for shift in shifts]), shifts


def _success(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = 1 / (1 + np.exp(-log_odds))
    return found


@dataclass
class Problems:
    """Held-out problems of different difficulty, and the scores of runs on them.

    Args:
        count: problems; a score of one is the mean of `samples` completions.
        training_noise: standard deviation of a run's true score around that of its block.
    """

    rng: np.random.Generator
    count: int = 300
    samples: int = 4
    training_noise: float = 0.0
    difficulty: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.difficulty = self.rng.normal(0, SPREAD, self.count)

    def base(self) -> NDArray[np.float64]:
        """Scores before training, [N]."""
        return self.scores(BASE)

    def runs(self, value: float, seeds: int) -> NDArray[np.float64]:
        """Scores of runs of a block whose contribution is `value`, [S, N]."""
        noise = self.training_noise * self.rng.standard_normal(seeds)
        return np.stack([self.scores(BASE + FULL_GAIN * value + own) for own in noise])

    def scores(self, level: float) -> NDArray[np.float64]:
        """Scores [N] of a policy that solves a share `level` of all problems there could be."""
        success = _success(float(np.interp(level, *_levels())) + self.difficulty)
        return self.rng.binomial(self.samples, success) / self.samples
