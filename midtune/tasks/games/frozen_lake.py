"""FrozenLake of textarena: a walk over a board, in text."""

from __future__ import annotations

import random
import re
from typing import Any

_MOVE = re.compile(r"\b(up|down|left|right)\b", re.IGNORECASE)
# Two games, so that a small model sees what an answer looks like and has met every move.
PROMPT = """Walk P to G, not into H. Moves: up, down, left, right.

. . .
. H .
P . G
Move: up
. . .
P H .
. . G
Move: up
P . .
. H .
. . G
Move: right
. P .
. H .
. . G
Move: right
. . P
. H .
. . G
Move: down
. . .
. H P
. . G
Move: down

. H P
. . .
. H G
Move: down
. H .
. . P
. H G
Move: left
. H .
. P .
. H G
Move: right
. H .
. . P
. H G
Move: down

"""


class FrozenLake:
    """Walk to the goal, in the last corner, and avoid the holes; the reward is 1 at the goal.

    Boards and rules are textarena's, but the start is any field from which the goal can be reached. P is the player, G
    the goal, H a hole. A move into a wall, or text without a move, changes nothing.
    """

    def reset(self, seed: int, size: int, holes: int, **row: Any) -> str:
        """Draw the board of a seed; it is solvable."""
        from textarena.envs.FrozenLake.env import FrozenLakeEnv

        state = random.getstate()
        random.seed(seed)
        try:
            # textarena draws from Python's own random state.
            self._game = FrozenLakeEnv(size=size, num_holes=holes)
            self._game.reset(num_players=1, seed=seed)
            board = self._game.state.game_state
            goal, fields = board["goal_pos"], [(i, j) for i in range(size) for j in range(size)]
            board["player_pos"] = random.choice(
                [it for it in fields if it != goal and self._game._has_valid_path(board["grid"], it, goal)]
            )
        finally:
            random.setstate(state)
        # Two wrong moves in a row would end the game.
        self._game.state.error_allowance = 10**9
        return self._shown()

    def step(self, action: str) -> str:
        """Move.

        Args:
            action: a text with up, down, left or right in it; the first one counts.
        """
        if move := _MOVE.search(action):
            self._game.step(f"[{move[1].lower()}]")
        return self._shown()

    def get_reward(self) -> float:
        """1 at the goal, else 0."""
        return float(self._game.state.game_state["player_pos"] == self._game.state.game_state["goal_pos"])

    @property
    def done(self) -> bool:
        return bool(self._game.state.done)

    def _shown(self) -> str:
        board = self._game.state.game_state
        rows = [[field.replace(" ", ".") for field in row] for row in board["grid"]]
        row, column = board["player_pos"]
        rows[row][column] = "P"
        return "\n".join(" ".join(row) for row in rows) + "\nMove:"
