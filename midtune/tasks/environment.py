"""Tasks played in turns, in environments with TRL's interface: a class made without arguments, with

- `reset(**row) -> str | None`: begins an episode; the text it returns is appended to the row's prompt. Episodes
  of one row must begin alike.
- `step(action: str) -> str`: what the model wrote → what it is shown next. A ValueError is shown to the model,
  as TRL does with errors of tools.
- `get_reward() -> float`: the reward of the episode so far. Optional if the task file has a `reward`, which gets
  the objects as `environments`.
- `done`: True once the episode is over. Without it, an episode ends with its last turn.
- `state`: equal for equal situations (hashable), for algorithms that compare turns. Default: the text shown last.

One object plays one episode after another. With `task.actions=tools` the class is TRL's in full: instead of
`step`, every public method is a tool for the model, described by its types and docstring.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midtune.errors import WHY, InputError, explained
from midtune.tasks.rewards import Reward, is_number, named
from midtune.tasks.split import Row

CLASS = "Environment"
MAX_TURNS = 10
_SHOWN = 200


@dataclass(frozen=True)
class Game:
    """How a task is played."""

    name: str  # what messages call the environment
    make: Callable[[], Any]
    max_turns: int  # actions after which an episode ends
    turn_tokens: int | None = None  # most tokens of an action; None: as many as the episode has left
    speech: Callable[[Any], Any] | None = None  # policy → how it calls the environment; None: by text
    _pool: list[Match] = field(default_factory=list, repr=False, compare=False)

    def matches(self, count: int) -> list[Match]:
        """Get `count` environments, made once and reused."""
        while len(self._pool) < count:
            self._pool.append(Match(self.name, self.make()))
        return self._pool[:count]

    def begin(self, rows: Sequence[Row]) -> list[Row]:
        """Begin an episode of each row in its own match; return the rows as `Match.reset` does."""
        return [match.reset(row) for match, row in zip(self.matches(len(rows)), rows, strict=True)]


class Match:
    """An environment during an episode; fills in what its class leaves out."""

    def __init__(self, name: str, environment: Any) -> None:
        self.name, self.environment = name, environment
        self._shown, self._reward, self._acted = "", 0.0, False
        self._row: Row = {}

    def reset(self, row: Row) -> Row:
        """Begin an episode; return the row with the first text shown appended to its prompt."""
        self._row = row
        self._show(self._call("reset", **row))
        self._acted = False
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {**row, "prompt": prompt + self._shown}
        *before, last = prompt
        return {**row, "prompt": [*before, {**last, "content": last["content"] + self._shown}]}

    def rewind(self) -> None:
        """Begin the same episode again, if an action was taken."""
        if self._acted:
            self.reset(self._row)

    def step(self, action: str) -> tuple[str, float]:
        """Act; return what is shown next, and the reward of this action."""
        self._acted = True
        shown = self._call("step", action)
        if not isinstance(shown, str | None):
            raise InputError(
                f"`step` of {self.name} returned {str(shown)[:_SHOWN]!r}; it must return the text that is shown next, "
                "and leave the reward to `get_reward` and the end to `done`."
            )
        return self._show(shown)

    def call(self, tool: str, arguments: dict[str, Any]) -> tuple[str, float]:
        """Call a tool, as TRL does; return what is shown next, and the reward of this call."""
        self._acted = True
        try:
            found = tools_of(self.environment)[tool](**arguments)
            shown = asyncio.run(found) if inspect.iscoroutine(found) else found
        except KeyError:
            shown = {"error": f"Tool {tool} not found."}
        except Exception as error:  # noqa: BLE001 (the model is told what a tool raises)
            shown = {"error": str(error)}
        return self._show(shown)

    def _show(self, shown: Any) -> tuple[str, float]:
        self._shown = "" if shown is None else str(shown)
        before, self._reward = self._reward, self._reward_so_far()
        return self._shown, self._reward - before

    @property
    def over(self) -> bool:
        return bool(getattr(self.environment, "done", False))

    @property
    def state(self) -> Hashable:
        state = getattr(self.environment, "state", self._shown)
        if not isinstance(state, Hashable):
            raise InputError(
                f"`state` of {self.name} is a {type(state).__name__}, which cannot be compared by its hash; make it a "
                "text or a tuple."
            )
        return state

    def _reward_so_far(self) -> float:
        if not hasattr(self.environment, "get_reward"):
            return 0.0
        found = self._call("get_reward")
        if not is_number(found):
            raise InputError(
                f"`get_reward` of {self.name} returned {found!r}; it must return a finite number."
            )
        return float(found)

    def _call(self, method: str, *arguments: Any, **columns: Any) -> Any:
        with explained(f"`{method}` of {self.name} raised {WHY}; fix it.", with_kind=True):
            try:
                return getattr(self.environment, method)(*arguments, **columns)
            except ValueError as error:
                if method != "step":
                    raise
                return str(error)


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """TRL's tools: an environment's public methods except `reset` and `get_reward`."""
    return {
        name: getattr(environment, name)
        for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
        if name not in ("reset", "get_reward") and not name.startswith("_")
    }


def check_environment(kind: Any, name: str, *, tools: bool) -> None:
    """Raise InputError unless a task file's `Environment` can be played: by text, or by calls of methods (`tools`)."""
    asked = f"`{CLASS}` of {name}"
    if not inspect.isclass(kind):
        raise InputError(f"{asked} is not a class; write `class {CLASS}:`.")
    for method, form in [("reset", "**row"), *([] if tools else [("step", "action")])]:
        if not callable(getattr(kind, method, None)):
            raise InputError(f"{asked} has no `{method}`; write `def {method}(self, {form})`.")
    with explained(f"{asked} cannot be made without arguments: it raised {WHY}; fix it.", with_kind=True):
        made = kind()
    if tools and not tools_of(made):
        raise InputError(f"{asked} has no public method but `reset`, so there is no tool to call; write one.")


def check_game(game: Game, rows: Sequence[Row]) -> None:
    """Begin an episode of each row twice, and act once by text; raise InputError if that fails or beginnings differ."""
    for row in rows:
        matches = game.matches(2)
        first, second = (match.reset(row)["prompt"] for match in matches)
        if first != second:
            raise InputError(
                f"{game.name} begins differently each time for one row, so episodes of a group cannot be compared; let "
                "`reset` draw from a seed that the row has."
            )
        if game.speech is None:
            matches[0].step("I do not know.")


def reward_of(kind: Any, name: str, judges: Sequence[str], reward: Reward | None = None) -> Reward:
    """The reward of a task played in turns: its file's own `reward`, else the environment's.

    Raises InputError if other rewards (`judges`) were asked for, or there is none.
    """
    if judges and [*judges] != ["verifier"]:
        raise InputError(
            f"{name} is played in turns and judged by its environment, but the reward {', '.join(judges)} was given; "
            "leave it out."
        )
    if reward is not None:
        return reward
    if not hasattr(kind, "get_reward"):
        raise InputError(
            f"`{CLASS}` of {name} has no `get_reward`, and the file no `reward`; write `def get_reward(self)`."
        )

    def episode_reward(environments: Sequence[Any], **columns: Any) -> list[float]:
        return [float(environment.get_reward()) for environment in environments]

    return named(episode_reward, "episode_reward")


def told_apart(row: Row) -> Row:
    """Put the row's other columns into its question: episodes with one prompt differ by a seed or the like."""
    others = {key: value for key, value in row.items() if key not in ("prompt", "question", "answer")}
    return {**row, "question": f"{row['question']} {others}"} if others else row
