"""A task file: lakes of 3 by 3 fields with a hole, to be crossed a move at a time."""

from __future__ import annotations

import itertools
import random

# Short, since a context passes through the model again at every turn.
PROMPT = """\
Moves: up, down, left, right. Row and column:
at 2 1, goal 2 3, hole 1 2
right
at 2 2, goal 2 3, hole 1 2
right
goal
at 3 2, goal 1 2, hole 3 3
up
at 2 2, goal 1 2, hole 3 3
up
goal
at 1 3, goal 2 2, hole 2 3
left
at 1 2, goal 2 2, hole 2 3
down
goal
"""
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SIZE = 3


def rows():
    fields = list(itertools.product(range(1, SIZE + 1), repeat=2))
    lakes = list(itertools.permutations(fields, 3))
    random.Random(0).shuffle(lakes)
    return [
        {"prompt": PROMPT, "start": list(start), "goal": list(goal), "hole": list(hole)}
        for start, goal, hole in lakes
    ]


class Environment:
    """A lake that is not slippery: 1 for the goal, nothing for the hole, where the episode ends too."""

    def reset(self, start, goal, hole, **row):
        self.place, self.goal, self.hole = tuple(start), tuple(goal), tuple(hole)
        return self.seen()

    @property
    def state(self):
        return self.place

    def step(self, action):
        down, right = MOVES.get(action.lower().strip(" ."), (0, 0))
        # At the edge one stays where one is, as after a word that is no move.
        self.place = tuple(min(max(at, 1), SIZE) for at in (self.place[0] + down, self.place[1] + right))
        if self.place == self.goal:
            return "goal", 1.0, True
        if self.place == self.hole:
            return "hole", 0.0, True
        return self.seen(), 0.0, False

    def seen(self):
        at, goal, hole = (f"{row} {column}" for row, column in (self.place, self.goal, self.hole))
        return f"at {at}, goal {goal}, hole {hole}"
