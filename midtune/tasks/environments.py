"""Environments that a policy acts in by texts, a turn at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from midtune.errors import InputError, MidtuneError


class Environment(Protocol):
    """What an episode is played in; a task file defines a class of this form, called without arguments.

    It may have an attribute or property `state`, hashable and equal where the same actions lead to the same; GiGPO
    compares steps that were taken in one state. Without it, that is what was observed last.
    """

    def reset(self, **row: Any) -> str | None:
        """Begin an episode; returns the first observation, which is put under the prompt, or None.

        Args:
            row: the row of the task without its prompt; with equal rows, episodes have to begin alike.
        """

    def step(self, action: str) -> tuple[str, float, bool]:
        """Act; returns what is observed then, the reward of the step, and whether the episode is over."""


def by_environment(completions: list[Any], **columns: Any) -> list[float]:
    """Stands where a task has its reward: there is none without an episode."""
    raise MidtuneError("the task's rewards come from its environment, in play.")


class Episode:
    """An environment in play, with what it answered checked.

    Raises:
        InputError: the environment raised an error or answered something else than it has to.
    """

    def __init__(self, make: Callable[[], Environment], row: dict[str, Any]) -> None:
        self.done = False
        self.states: list[Hashable] = []
        self.rewards: list[float] = []
        self._environment = _asked("Environment()", make)
        given = {key: value for key, value in row.items() if key != "prompt"}
        self.observation = _asked("Environment.reset", lambda: self._environment.reset(**given))
        if not isinstance(self.observation, str | None):
            raise InputError(
                f"Environment.reset returned {self.observation!r}; it must return a text or None."
            )

    def act(self, action: str) -> None:
        """Take a step; keeps the state it was taken in, its reward and what was observed after it."""
        state = getattr(self._environment, "state", self.observation)
        if not isinstance(state, Hashable):
            raise InputError(
                f"Environment.state is {state!r}; it must be hashable, such as a text or a tuple."
            )
        found = _asked("Environment.step", lambda: self._environment.step(action))
        try:
            observation, reward, done = found
            reward = float(reward)
        except (TypeError, ValueError):
            observation, reward, done = None, math.nan, False
        if not isinstance(observation, str) or not math.isfinite(reward):
            raise InputError(
                f"Environment.step returned {found!r}; it must return a text, a finite reward and whether the episode "
                "is over."
            )
        self.states.append(state)
        self.rewards.append(reward)
        self.observation, self.done = observation, bool(done)


def _asked(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 (a person's environment can raise anything)
        raise InputError(f"{what} raised {type(error).__name__}: {error}; mend it.") from error
