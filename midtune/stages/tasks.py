"""`midtune tasks`: the tasks that need no file, and a problem of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midtune.errors import InputError

PREFIX = "reasoning-gym:"


def run(name: str | None, *, args: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What there is to train on.

    Args:
        name: `tiny-programs`, or a reasoning-gym dataset, with or without `reasoning-gym:`; None lists all.
        args: arguments of the dataset.
        seed: which problem to show.

    Returns:
        Without a name, `tasks`: the names as --task takes them; with one, `task`, `arguments` (key → value
        in force), `question` and `answer`.

    Raises:
        InputError: there is no such dataset, or an argument is wrong.
    """
    from midtune.tasks import example, list_tasks, programs, task_arguments

    if name is None:
        return {"tasks": [*(PREFIX + known for known in list_tasks()), programs.NAME]}
    if name == programs.NAME:
        if args:
            raise InputError(f"{name} takes no arguments, but {dict(args)} was given; leave it out.")
        row = programs.example(seed, 0)
        return {"task": name, "arguments": {}, "question": row["question"], "answer": row["answer"]}
    short = name.removeprefix(PREFIX)
    shown = example(short, args, seed)
    return {
        "task": PREFIX + short,
        "arguments": {**task_arguments(short), **args},
        "question": shown["question"],
        "answer": shown["answer"],
    }
