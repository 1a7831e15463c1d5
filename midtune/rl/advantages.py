"""Pure functions for the advantages TRL does not compute; GRPO's and Dr. GRPO's are its own.

NaN means no reward function scored the completion. It is left out of the group mean and gets advantage 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

# TRL adds this to a standard deviation before dividing by it.
EPSILON = 1e-4

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Turns:
    """An episode, turn by turn; turns in equal states are compared."""

    states: Sequence[Hashable]  # [T], the environment's when the policy acted
    rewards: Sequence[float]  # [T], immediate; they sum to the episode's reward


def leave_one_out(rewards: Values) -> Values:
    """RLOO (arXiv 2402.14740): each reward minus the mean of the others in its group, [N, G] → [N, G]."""
    return np.array([_against_others(group) for group in rewards])


def group_relative(rewards: Values, *, scaled: bool = True) -> Values:
    """GRPO (arXiv 2402.03300): rewards minus their group's mean, over its standard deviation, [N, G] → [N, G].

    The standard deviation is of samples (G − 1), as in TRL. Not `scaled` is Dr. GRPO (2503.20783): no division.
    """
    return np.array([_normalized(group, scaled) for group in rewards])


def discounted_returns(rewards: Sequence[float], gamma: float) -> Values:
    """Σ_{k≥t} γ^(k−t) r_k for every turn t of an episode, [T] → [T]."""
    backwards = accumulate(reversed(rewards), lambda after, reward: reward + gamma * after)
    return np.array([*backwards], dtype=np.float64)[::-1]


def turn_relative(group: Sequence[Turns], gamma: float, *, scaled: bool = True) -> list[Values]:
    """GiGPO's turn-level half: discounted returns, compared among turns that began in equal states.

    The episodes of `group` have equal starts; a state an episode returns to counts each time. If `scaled`, differences
    from the mean are divided by the standard deviation. Returns each episode's [T] advantages, 0 in a state met once.
    """
    found = [discounted_returns(episode.rewards, gamma) for episode in group]
    anchors: dict[Hashable, list[tuple[int, int]]] = {}
    for number, episode in enumerate(group):
        for turn, state in enumerate(episode.states):
            anchors.setdefault(state, []).append((number, turn))
    for places in anchors.values():
        compared = _normalized(np.array([found[number][turn] for number, turn in places]), scaled)
        for (number, turn), value in zip(places, compared, strict=True):
            found[number][turn] = value
    return found


def gigpo(
    rewards: Values, episodes: Sequence[Turns], *, omega: float, gamma: float, scaled: bool = True
) -> list[Values]:
    """GiGPO (arXiv 2505.10978, equations 3 to 8): an episode's advantage in its group + ω × a turn's in its state.

    `rewards` [N, G] are of whole episodes; the G of a row began alike. `episodes` are N·G in the same order. `gamma`
    discounts later rewards. If `scaled`, both halves are divided by standard deviations; the paper also has both
    without. Returns [T] advantages of each episode's turns.
    """
    size = rewards.shape[1]
    whole = group_relative(rewards, scaled=scaled).flatten()
    turns = [
        advantages
        for start in range(0, len(episodes), size)
        for advantages in turn_relative(episodes[start : start + size], gamma, scaled=scaled)
    ]
    return [own + omega * by_turn for own, by_turn in zip(whole, turns, strict=True)]


def _against_others(values: Values) -> Values:
    """Values minus the mean of the others; exactly 0 if all are equal."""
    known = values[~np.isnan(values)]
    if len(known) < 2 or np.ptp(known) == 0:
        return np.zeros_like(values)
    return np.nan_to_num((values - known.mean()) * len(known) / (len(known) - 1))


def _normalized(values: Values, scaled: bool) -> Values:
    """Values minus their mean, divided by their standard deviation if `scaled`; exactly 0 if all are equal."""
    known = values[~np.isnan(values)]
    if len(known) < 2 or np.ptp(known) == 0:
        return np.zeros_like(values)
    return np.nan_to_num((values - known.mean()) / (known.std(ddof=1) + EPSILON if scaled else 1))
