"""ALFWorld: household tasks in text, played in the alfworld package's data.

The package evaluates expressions that a game holds: trust a game as you would a program.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from midtune.errors import WHY, InputError, explained
from midtune.tasks.split import Row, Sizes, Split, given_split, problem

# From GiGPO's authors (arXiv 2505.10978); given once, because an episode is one conversation here.
PROMPT = (
    "You are an expert agent operating in the ALFRED Embodied Environment. At every step, first reason step-by-step "
    "about the current situation, within <think> </think> tags. Then choose one admissible action and present it "
    "within <action> </action> tags.\n\n"
)
GAME = "game.tw-pddl"
# The end may be cut off by a limit or a stop text.
_ACTION = re.compile(r"<action>(.*?)(?:</action>|\Z)", re.DOTALL)
_TASK = re.compile(r"Your task is to: ([^\"\\]+)")


class ALFWorld:
    """A task in a household; the reward is 1 once it is done (its authors' 10), else 0."""

    def __init__(self) -> None:
        import fast_downward
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        fast_downward.pddl2sas = _translated
        self._game = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))

    def reset(self, game: str, **row: Any) -> str:
        """Begin a game, given its folder within the data."""
        self._game.load(str(data_folder() / game / GAME))
        self._now = self._game.reset()
        return self._shown(self._now.feedback.partition("\n\n")[2])

    def step(self, action: str) -> str:
        """Act.

        Args:
            action: a text with the action between tags, the first of which count, or nothing but the action. What
                is none changes nothing, and the game says so.
        """
        said = action.lower()
        found = _ACTION.search(said)
        self._now, _, _ = self._game.step((found[1] if found else said).strip())
        return self._shown(self._now.feedback)

    def get_reward(self) -> float:
        """1 if the task is done, else 0."""
        return float(bool(self._now.won))

    @property
    def done(self) -> bool:
        return bool(self._now.won)

    def _shown(self, feedback: str) -> str:
        actions = ", ".join(repr(command) for command in self._now.admissible_commands if command != "help")
        return f"{feedback.strip()}\nYour admissible actions of the current situation are: [{actions}]."


@lru_cache(maxsize=64)
def _translated(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> Any:
    """Translate a game for the planner; cached: it takes seconds in a large room, and a whole group asks for it."""
    from fast_downward.interface import pddl2sas

    arguments = sys.argv
    try:
        return pddl2sas(domain, problem, verbose, optimize)
    finally:
        # The translator overwrites it.
        sys.argv = arguments


def data_folder() -> Path:
    """Where `alfworld-download` puts its games, whether or not they are there."""
    return Path(os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")).expanduser() / "json_2.1.1"


def draw_households(arguments: Mapping[str, int], sizes: Sizes) -> Split:
    """Rows with a `game`'s folder, from `train` and, held out, seen or `unseen` rooms; InputError without the data."""
    rooms = "valid_unseen" if arguments["unseen"] else "valid_seen"
    train = islice(_games("train", sizes.seed), sizes.train)
    held_out = islice(_games(rooms, sizes.seed), sizes.held_out)
    return given_split([*train], [*held_out], sizes)


def _games(part: str, seed: int) -> Iterator[Row]:
    """The problems of games that can be won and that the package plays."""
    folder = data_folder()
    files = sorted((folder / part).glob(f"*/*/{GAME}"))
    if not files:
        raise InputError(
            f"alfworld has no games in {folder / part}; download them with `alfworld-download`, or say in "
            "ALFWORLD_DATA where they are."
        )
    random.Random(seed).shuffle(files)
    for file in files:
        game = file.parent.relative_to(folder).as_posix()
        if "movable" in game or "Sliced" in game:
            continue  # the package leaves these out
        with explained(f"{file} is no game of ALFWorld ({WHY}); download it again."):
            told = json.loads(file.read_text(encoding="utf-8"))
            task = _TASK.search(told["grammar"])
        if told.get("solvable") and task is not None:
            yield problem(PROMPT, f"{PROMPT}Your task is to: {task[1]} ({game})", game=game)
