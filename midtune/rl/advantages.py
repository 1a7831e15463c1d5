"""Advantages from the rewards of a group, as pure functions.

Where rewards are divided by their standard deviation, it is that of a sample (n − 1), with 1e-4 added: what TRL
does, so that an episode's term here is the advantage that TRL gives a completion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def group_relative(rewards: Sequence[float], *, scaled: bool = True) -> Values:
    """Each reward [n] less the mean of all, divided by their standard deviation if `scaled`; one alone gets 0."""
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2:
        return np.zeros_like(values)
    centred = values - values.mean()
    return centred / (values.std(ddof=1) + 1e-4) if scaled else centred


def leave_one_out(rewards: Sequence[float]) -> Values:
    """RLOO's advantage (arXiv 2402.14740): each reward [n] less the mean of the others; one alone gets 0."""
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2:
        return np.zeros_like(values)
    return values - (values.sum() - values) / (len(values) - 1)


def step_returns(rewards: Sequence[float], gamma: float) -> Values:
    """Return of every step of an episode: R_t = Σ_{k≥t} γ^(k−t) r_k, [T] → [T]."""
    returns = np.asarray(rewards, dtype=np.float64).copy()
    for step in range(len(returns) - 2, -1, -1):
        returns[step] += gamma * returns[step + 1]
    return returns


def gigpo(
    states: Sequence[Sequence[Hashable]],
    rewards: Sequence[Sequence[float]],
    *,
    gamma: float,
    omega: float,
    scaled: bool = True,
) -> list[Values]:
    """GiGPO's advantage (arXiv 2505.10978) of every step of a group of episodes that began alike.

    It is the episode's advantage among the episodes plus `omega` times that of the step's return among all
    steps of the group that were taken in an equal state. A state met once leaves the episode's.

    Args:
        states: of each episode, the state in which each step was taken.
        rewards: of each episode, the reward of each step.
        gamma: what a reward counts a step earlier.
        scaled: divide by standard deviations; without, both terms are differences from means.

    Returns:
        An array [T] for each episode of T steps.
    """
    returns = [step_returns(own, gamma) for own in rewards]
    episode = group_relative([sum(own) for own in rewards], scaled=scaled)
    advantages: list[Values] = [
        np.full(len(own), value, dtype=np.float64) for own, value in zip(rewards, episode, strict=True)
    ]
    anchors: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for row, own in enumerate(states):
        for step, state in enumerate(own):
            anchors[state].append((row, step))
    for places in anchors.values():
        among = group_relative([returns[row][step] for row, step in places], scaled=scaled)
        for (row, step), value in zip(places, among, strict=True):
            advantages[row][step] += omega * value
    return advantages
