"""Trying a task's reward on real rows before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from midtune.errors import InputError
from midtune.tasks.rewards import Reward, completion_of
from midtune.tasks.split import Row
from midtune.tasks.task import Task

_ROWS = 4
_SHOWN = 200
_WRONG = "I do not know."


def check_reward(task: Task) -> None:
    """Calls the task's reward and score on its first rows with right, wrong and empty completions.

    Raises:
        InputError: one of them raises, returns anything but one number (or None) per completion, or a
            built-in reward gives right answers no more than empty ones.
    """
    rows = task.train[:_ROWS]
    right = [row["answer"] for row in rows]
    for reward in dict.fromkeys([task.reward, task.score]):
        for_right = _call(reward, rows, right, task)
        _call(reward, rows, [_WRONG] * len(rows), task)
        for_empty = _call(reward, rows, [""] * len(rows), task)
        pairs = zip(for_right, for_empty, right, strict=True)
        # Some reasoning-gym datasets give no answer to compare with, only a verifier.
        known = [(a or 0.0) > (b or 0.0) for a, b, answer in pairs if answer]
        if known and not any(known) and not task.own_reward:
            raise InputError(
                f"the reward `{task.reward.__name__}` gives right answers of `{task.name}` no more than empty ones, "
                f"as on {_shown(rows[0])}; choose another reward with --reward."
            )


def _call(reward: Reward, rows: Sequence[Row], texts: Sequence[str], task: Task) -> list[float | None]:
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    asked = f"the reward `{reward.__name__}` of `{task.name}`"
    try:
        values: Any = reward(
            prompts=[row["prompt"] for row in rows],
            completions=[completion_of(row["prompt"], text) for row, text in zip(rows, texts, strict=True)],
            completion_ids=[[0] * bool(text) for text in texts],
            **columns,
        )
    except Exception as error:
        raise InputError(
            f"{asked} raised {type(error).__name__}: {error}, on {_shown(rows[0])} with the completion "
            f"{texts[0][:_SHOWN]!r}; mend it."
        ) from error
    try:
        values = list(values)
    except TypeError:
        raise InputError(
            f"{asked} returned {str(values)[:_SHOWN]!r}, but it must return a list with one number per completion."
        ) from None
    if len(values) != len(rows):
        raise InputError(
            f"{asked} returned {len(values)} values for {len(rows)} completions, first {_shown(rows[0])}; "
            "it must return one number per completion."
        )
    for value, row, text in zip(values, rows, texts, strict=True):
        if value is not None and not _is_number(value):
            raise InputError(
                f"{asked} returned {str(value)[:_SHOWN]!r} for the completion {text[:_SHOWN]!r} on {_shown(row)}; "
                "it must return finite numbers (or None where it does not apply)."
            )
    return [None if value is None else float(value) for value in values]


def _is_number(value: Any) -> bool:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _shown(row: Row) -> str:
    text = str({key: value for key, value in row.items() if key != "prompt"})
    return f"row {text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'}"
