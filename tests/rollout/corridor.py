"""A corridor to walk along, for random models: what they wrote decides how far they go, whatever it is."""

from __future__ import annotations

from typing import Any

from midtune.model.policy import Policy
from midtune.rollout.episodes import EpisodeSampler
from midtune.rollout.sampling import SamplingLimits
from midtune.tasks.environment import Game, reward_of

ROWS = [{"prompt": f"{'hall' * width} ", "width": width, "answer": ""} for width in range(1, 7)]
# As a task gives them.
PLAYED = [{**row, "question": str(row["width"])} for row in ROWS]


class Corridor:
    """Longer texts go further; the reward is the share of the way, less a little for every turn."""

    def reset(self, width: int, **row: Any) -> str:
        self.width, self.place, self.turns, self.done = width + 2, 0, 0, False
        return f"at {self.place}"

    def step(self, action: str) -> str:
        """Walk.

        Args:
            action: anything.
        """
        self.turns += 1
        self.place += 1 + len(action.encode()) % 3
        self.done = self.place >= self.width
        # Replies of different lengths.
        return f" at {'x' * self.place}"

    def get_reward(self) -> float:
        return self.place / self.width - 0.1 * self.turns

    @property
    def state(self) -> int:
        return self.place


OWN = reward_of(Corridor, "the corridor", [])


def game() -> Game:
    return Game("the corridor", Corridor, max_turns=4, turn_tokens=4)


def episode_sampler(policy: Policy) -> EpisodeSampler:
    return EpisodeSampler(policy, SamplingLimits(), game())
