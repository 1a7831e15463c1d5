"""The text games from packages: what plays each, and how its problems are drawn."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from midtune.errors import InputError
from midtune.tasks.environment import MAX_TURNS
from midtune.tasks.games import alfworld, frozen_lake, textworld
from midtune.tasks.split import Row, Sizes, Split, draw_split, problem


@dataclass(frozen=True)
class GameKind:
    """A game that needs no file."""

    environment: Callable[[], Any]  # the class that plays it (`environment.py`)
    prompt: str
    arguments: Mapping[str, int]  # whole numbers that `reset` gets, and their defaults
    packages: tuple[str, ...]  # required; the first is also midtune's extra
    draw: Callable[[Mapping[str, int], Sizes], Split] | None = None  # for games that no seed determines
    max_turns: int = MAX_TURNS


GAMES = {
    "frozen-lake": GameKind(
        frozen_lake.FrozenLake, frozen_lake.PROMPT, {"size": 3, "holes": 2}, ("textarena",)
    ),
    "textworld": GameKind(
        textworld.TextWorld, textworld.PROMPT, {"rooms": 1, "objects": 2, "quest": 1}, ("textworld",)
    ),
    "alfworld": GameKind(
        alfworld.ALFWorld,
        alfworld.PROMPT,
        {"unseen": 0},
        ("alfworld", "fast_downward"),
        alfworld.draw_households,
        max_turns=50,  # as in GiGPO
    ),
}


def draw_games(name: str, args: Mapping[str, Any], sizes: Sizes) -> tuple[Split, dict[str, int]]:
    """Rows with what a game begins with, and its arguments; InputError for wrong ones or a missing package or data."""
    kind = GAMES[name]
    if any(importlib.util.find_spec(package) is None for package in kind.packages):
        extra = kind.packages[0]
        raise InputError(
            f"{name} needs the package {extra}; install it with `pip install 'midtune[{extra}]'`."
        )
    for key, value in args.items():
        if key not in kind.arguments:
            known = ", ".join(f"{key} ({default})" for key, default in kind.arguments.items())
            raise InputError(f"`{name}` has no argument `{key}`; it has {known}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"`{key}` of {name} is {value!r}; give a whole number from 0 on.")
    arguments = {**kind.arguments, **args}
    if name == "frozen-lake" and not arguments["size"] > max(arguments["holes"], 1):
        raise InputError(
            f"a lake of size {arguments['size']} may have no way around {arguments['holes']} holes; give a "
            "size from 2 on, and fewer holes than that."
        )
    if kind.draw is not None:
        return kind.draw(arguments, sizes), arguments
    environment = kind.environment()

    def row(index: int) -> Row:
        columns = {"seed": random.Random(f"{name} {sizes.seed} {index}").randrange(2**31), **arguments}
        return problem(kind.prompt, kind.prompt + environment.reset(**columns), **columns)

    return draw_split(lambda start, stop: [row(n) for n in range(start, stop)], sizes), arguments
