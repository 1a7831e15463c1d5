"""`midtune tasks`: the reasoning-gym datasets, and a problem of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "reasoning-gym:"


def run(name: str | None, *, args: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What there is to train on.

    Args:
        name: a reasoning-gym dataset, with or without `reasoning-gym:`; None lists all of them.
        args: arguments of the dataset.
        seed: which problem to show.

    Returns:
        Without a name, `tasks`: the names as --task takes them; with one, `task`, `arguments` (key → value
        in force), `question` and `answer`.

    Raises:
        InputError: there is no such dataset, or an argument is wrong.
    """
    from midtune.tasks import example, list_tasks, task_arguments

    if name is None:
        return {"tasks": [PREFIX + known for known in list_tasks()]}
    short = name.removeprefix(PREFIX)
    shown = example(short, args, seed)
    return {
        "task": PREFIX + short,
        "arguments": {**task_arguments(short), **args},
        "question": shown["question"],
        "answer": shown["answer"],
    }
