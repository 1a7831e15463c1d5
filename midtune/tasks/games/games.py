"""Text games to be played in turns: FrozenLake of textarena, games that textworld makes up, and ALFWorld's."""

from __future__ import annotations

import importlib.util
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.tasks.environment import MAX_TURNS
from midtune.tasks.games.alfworld import PROMPT, ALFWorld, draw_households
from midtune.tasks.split import Row, Split, draw_split

_MOVE = re.compile(r"\b(up|down|left|right)\b", re.IGNORECASE)


class FrozenLake:
    """Walk to the goal, in the last corner, and keep off the holes; the reward is 1 at the goal.

    Boards and rules are textarena's, but for the start, which is any field that the goal can be reached from. The
    board is shown in one letter a field: P the player, G the goal, H a hole. A move into a wall, and what is no move,
    leave everything as it was.
    """

    def reset(self, seed: int, size: int, holes: int, **row: Any) -> str:
        """Draw the board of a seed; it is solvable."""
        from textarena.envs.FrozenLake.env import FrozenLakeEnv

        with _seeded(seed):
            self._game = FrozenLakeEnv(size=size, num_holes=holes)
            self._game.reset(num_players=1, seed=seed)
            board = self._game.state.game_state
            goal, fields = board["goal_pos"], [(i, j) for i in range(size) for j in range(size)]
            board["player_pos"] = random.choice(
                [it for it in fields if it != goal and self._game._has_valid_path(board["grid"], it, goal)]
            )
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


class TextWorld:
    """A quest in a house that textworld makes up; the reward is the share of its points."""

    def reset(self, seed: int, rooms: int, objects: int, quest: int, **row: Any) -> str:
        """Begin the game of a seed, which is made once."""
        import textworld

        wanted = textworld.EnvInfos(
            description=True,
            inventory=True,
            admissible_commands=True,
            objective=True,
            score=True,
            max_score=True,
        )
        with warnings.catch_warnings():
            # The interpreter does not know the game; textworld keeps its state itself.
            warnings.simplefilter("ignore")
            self._game = textworld.start(_made(seed, rooms, objects, quest), wanted)
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
        """The points so far, of those there are."""
        return float(self._now.score or 0) / max(self._now.max_score or 1, 1)

    @property
    def done(self) -> bool:
        return bool(self._over)

    def _shown(self) -> str:
        place = " ".join((self._now.description or "").split())
        commands = ", ".join(self._now.admissible_commands or [])
        return f"{place} {' '.join((self._now.inventory or '').split())}\nYou can: {commands}\nCommand:"


# Two games, so that a small model sees what an answer looks like and has met every move.
_LAKE = """Walk P to G, not into H. Moves: up, down, left, right.

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


@dataclass(frozen=True)
class _Kind:
    environment: Callable[[], Any]
    package: str
    prompt: str
    arguments: Mapping[str, int]
    # Draws rows where games are no matter of seeds.
    draw: Callable[..., Split] | None = None
    planner: tuple[str, ...] = ()
    max_turns: int = MAX_TURNS


GAMES = {
    "frozen-lake": _Kind(
        FrozenLake,
        "textarena",
        _LAKE,
        {"size": 3, "holes": 2},
    ),
    "textworld": _Kind(
        TextWorld,
        "textworld",
        "You play a text adventure. Answer with one command.\n\n",
        {"rooms": 1, "objects": 2, "quest": 1},
    ),
    "alfworld": _Kind(
        ALFWorld,
        "alfworld",
        PROMPT,
        {"unseen": 0},
        draw_households,
        ("fast_downward",),
        max_turns=50,  # as GiGPO's authors have it
    ),
}


def game_arguments(name: str, args: Mapping[str, Any]) -> dict[str, int]:
    """The complete arguments of a game.

    Raises:
        InputError: its package is missing, or an argument is none of its own or no whole number from 0 on.
    """
    kind = GAMES[name]
    if any(importlib.util.find_spec(package) is None for package in (kind.package, *kind.planner)):
        raise InputError(
            f"{name} needs the package {kind.package}; install it with `pip install 'midtune[{kind.package}]'`."
        )
    for key, value in args.items():
        if key not in kind.arguments:
            known = ", ".join(f"{key} ({default})" for key, default in kind.arguments.items())
            raise InputError(f"`{name}` has no argument `{key}`; it has {known}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"`{key}` of {name} is {value!r}; give a whole number from 0 on.")
    found = {**kind.arguments, **args}
    if name == "frozen-lake" and not found["size"] > max(found["holes"], 1):
        raise InputError(
            f"a lake of size {found['size']} may have no way around {found['holes']} holes; give a size from 2 on, and "
            "fewer holes than that."
        )
    return found


def draw_games(
    name: str, arguments: Mapping[str, int], *, train_size: int, eval_size: int, seed: int
) -> Split:
    """Rows with what a game is begun by, such as a `seed` and its arguments; games that begin alike are one."""
    kind = GAMES[name]
    if kind.draw is not None:
        return kind.draw(arguments, train_size=train_size, eval_size=eval_size, seed=seed)
    environment = kind.environment()

    def draw(start: int, stop: int) -> list[Row]:
        rows = []
        for index in range(start, stop):
            columns = {"seed": random.Random(f"{name} {seed} {index}").randrange(2**31), **arguments}
            prompt = [{"role": "user", "content": kind.prompt}]
            question = kind.prompt + environment.reset(**columns)
            rows.append({"prompt": prompt, "question": question, "answer": "", **columns})
        return rows

    return draw_split(draw, train_size=train_size, eval_size=eval_size, seed=seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's random state at `seed` inside, and as it was afterwards; textarena draws from it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="midtune-textworld-")


@cache
def _made(seed: int, rooms: int, objects: int, quest: int) -> str:
    """The file of a game, which lasts as long as the process."""
    import textworld

    options = textworld.GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = seed, rooms, objects, quest
    options.path = str(Path(_folder().name) / f"{seed}-{rooms}-{objects}-{quest}.z8")
    path, _ = textworld.make(options)
    return str(path)
