"""A toy environment: a counter that actions move, told apart by their length."""

from __future__ import annotations


class Counting:
    """Over after `turns` steps; an action of an even number of characters moves on and is rewarded."""

    def __init__(self) -> None:
        self.place = self.taken = 0

    @property
    def state(self) -> int:
        return self.place

    def reset(self, turns: int, **row: object) -> str | None:
        self.turns = turns
        return f"of {turns}"

    def step(self, action: str) -> tuple[str, float, bool]:
        self.taken += 1
        moved = len(action) % 2 == 0
        self.place += moved
        return f"at {self.place}", float(moved), self.taken == self.turns
