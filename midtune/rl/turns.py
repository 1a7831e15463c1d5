"""Prepare episodes for the trainer: turns to compare, each token's advantage, and summary figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from midtune.rl.advantages import Turns, Values
from midtune.rollout.episodes import Episode


def turns_of(episode: Episode, reward: float) -> Turns:
    """An episode's states and rewards; `reward` beyond its turns' sum goes to the last one."""
    rewards = [turn.reward for turn in episode.turns]
    if not np.isnan(reward):
        rewards[-1] += reward - sum(rewards)
    return Turns([turn.state for turn in episode.turns], rewards)


def token_advantages(episodes: Sequence[Episode], advantages: Sequence[Values], width: int) -> torch.Tensor:
    """Advantages of tokens [N·G, C] in fp32: that of its turn for a drawn token, else 0; `width` is C."""
    tokens = torch.zeros(len(episodes), width)
    for row, (episode, values) in enumerate(zip(episodes, advantages, strict=True)):
        for turn, value in zip(episode.turns, values, strict=True):
            tokens[row, turn.start : turn.stop] = float(value)
    return tokens


def figures_of(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over episodes: `turns`, and `shown_length` (tokens not drawn); empty if there are none."""
    if not episodes:
        return {}
    turns = [turn for episode in episodes for turn in episode.turns]
    shown = sum(len(episode.ids) for episode in episodes) - sum(turn.stop - turn.start for turn in turns)
    return {"turns": len(turns) / len(episodes), "shown_length": shown / len(episodes)}
