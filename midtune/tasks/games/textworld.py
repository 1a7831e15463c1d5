"""Quests that textworld generates."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

PROMPT = "You play a text adventure. Answer with one command.\n\n"


class TextWorld:
    """A quest in a generated house; the reward is the share of its points."""

    def reset(self, seed: int, rooms: int, objects: int, quest: int, **row: Any) -> str:
        """Begin the game of a seed, which is generated once."""
        import textworld

        wanted = "description inventory admissible_commands objective score max_score".split()
        infos = textworld.EnvInfos(**dict.fromkeys(wanted, True))
        # The interpreter does not know the game; textworld keeps its state itself.
        with warnings.catch_warnings(action="ignore"):
            self._game = textworld.start(_made(seed, rooms, objects, quest), infos)
        self._now = self._game.reset()
        self._over = False
        return f"{self._now.objective.strip()}\n{self._shown()}"

    def step(self, action: str) -> str:
        """Say a command.

        Args:
            action: one of the commands that were shown; only its first line counts.
        """
        command = action.strip().splitlines()[0].strip() if action.strip() else "look"
        self._now, _, self._over = self._game.step(command)
        return self._shown()

    def get_reward(self) -> float:
        """The share of the points so far."""
        return float(self._now.score or 0) / max(self._now.max_score or 1, 1)

    @property
    def done(self) -> bool:
        return bool(self._over)

    def _shown(self) -> str:
        place = " ".join((self._now.description or "").split())
        commands = ", ".join(self._now.admissible_commands or [])
        return f"{place} {' '.join((self._now.inventory or '').split())}\nYou can: {commands}\nCommand:"


@cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="midtune-textworld-")


@cache
def _made(seed: int, rooms: int, objects: int, quest: int) -> str:
    """The file of a game, kept until the process ends."""
    import textworld

    options = textworld.GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = seed, rooms, objects, quest
    options.path = str(Path(_folder().name) / f"{seed}-{rooms}-{objects}-{quest}.z8")
    return str(textworld.make(options)[0])
