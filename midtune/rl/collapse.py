"""Detect collapse: the model learned, and now writes the same, worse completion every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

WINDOW = 10


@dataclass(frozen=True)
class Collapse:
    """Where a run collapsed."""

    steps: int  # steps done when it showed
    best: float  # highest earlier mean reward of ten steps
    now: float  # mean reward of the last ten

    def __str__(self) -> str:
        return (
            f"in steps {self.steps - WINDOW + 1} to {self.steps} all completions of each prompt got equal rewards, and "
            f"their mean was {self.now:.2g}, after {self.best:.2g} at best: training seems to have collapsed; start "
            "again with --lr auto or a lower number, or with a KL term (--beta) above the one it had"
        )


def find_collapse(rewards: Sequence[float], equal_groups: Sequence[float]) -> Collapse | None:
    """The first collapse of a run, or None, from each step's mean reward and share of groups with equal rewards.

    All groups had equal rewards for ten steps, after some had unequal ones, and the mean reward of these steps is
    below the best mean of ten steps by more than three standard errors and a tenth of the range of all rewards.
    """
    best: Sequence[float] = ()
    for end in range(WINDOW, len(rewards) + 1):
        window = rewards[end - WINDOW : end]
        if not best or fmean(window) > fmean(best):
            best = window
        if min(equal_groups[end - WINDOW : end]) < 1 or min(equal_groups[:end]) == 1:
            continue
        fall = fmean(best) - fmean(window)
        error = math.sqrt((variance(best) + variance(window)) / WINDOW)
        if fall > max(3 * error, (max(rewards[:end]) - min(rewards[:end])) / 10):
            return Collapse(end, fmean(best), fmean(window))
    return None


def collapse_in(steps: Sequence[Mapping[str, Any]]) -> Collapse | None:
    """The first collapse in lines of metrics.jsonl; skips steps without a reward."""
    known = [step for step in steps if step["reward"] is not None]
    return find_collapse([step["reward"] for step in known], [step["equal_groups"] for step in known])
