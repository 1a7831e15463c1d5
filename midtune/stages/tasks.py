"""`midtune tasks`: list the tasks that need no file, show a problem of a task, or check your own task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from midtune.config import RunConfig, require_task, with_settings
from midtune.errors import InputError
from midtune.report.terminal import Terminal
from midtune.stages.opening import Opened, read_task
from midtune.tasks import GAMES, doubts, list_tasks, programs, scored_samples, task_arguments

PREFIX = "reasoning-gym:"


def run(config: RunConfig | None, terminal: Terminal, *, check: bool = False) -> dict[str, Any]:
    """List tasks if `config` is None; else show a problem of its task, or `check` the whole task.

    A reasoning-gym dataset may be named without `reasoning-gym:`.

    Returns:
        Without a configuration, `tasks`: names for --task. With one, `task`, `arguments` (key → value in force),
        `question`, `prompt` and `answer`, `reward`, and, if there is an answer, `right` and `wrong` (a completion and
        its score). When checking, `checked`, and lists of sentences, `findings` and `doubts`.

    Raises InputError if there is no such task, an argument is wrong, or the check fails.
    """
    if config is None:
        return {"tasks": sorted([*(PREFIX + known for known in list_tasks()), programs.NAME, *GAMES])}
    name = require_task(config)
    if re.fullmatch(r"\w+", name) and name not in GAMES and not Path(name).exists():
        config = with_settings(config, {"task.name": PREFIX + name})
    return _checked(config, terminal) if check else _shown(config, terminal)


def _shown(config: RunConfig, terminal: Terminal) -> dict[str, Any]:
    name = require_task(config)
    task = read_task(with_settings(config, {"task.train_size": 4, "task.eval_size": 2}))
    if task.note:
        terminal.message(task.note)
    row = task.train[0]
    if task.game is not None:
        (row,) = task.game.begin([row])
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    known = task_arguments(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else {}
    found = {
        "task": name,
        "arguments": {**known, **config.task.args},
        "question": row["question"],
        "prompt": prompt,
        "answer": row["answer"],
        "reward": task.reward.__name__,
    }
    if row["answer"]:
        right, wrong = scored_samples(task, row)
        found |= {"right": vars(right), "wrong": vars(wrong)}
    return found


def _checked(config: RunConfig, terminal: Terminal) -> dict[str, Any]:
    name = require_task(config)
    # Read all problems that a run of any length could use.
    config = with_settings(config, {"training.steps": config.task.train_size})
    task = Opened(config, terminal).task
    again = read_task(config)
    if (task.fingerprint, task.train, task.held_out) != (again.fingerprint, again.train, again.held_out):
        raise InputError(
            f"{name} gives other rows when it is read again, so a run could not be resumed; seed what draws them."
        )
    findings = [
        f"{len(task.train)} problems to train on and {len(task.held_out)} to evaluate on, none of them in both",
        f"the longest question has {max(len(row['question']) for row in task.train)} characters",
    ]
    if columns := task.columns:
        findings.append(f"the reward gets the columns {', '.join(f'`{column}`' for column in columns)}")
    if task.game is not None:
        findings.append(f"{task.game.name} begins as it did before")
        return {"checked": name, "findings": findings, "doubts": []}
    findings.append(f"the reward `{task.reward.__name__}` gives one finite number for each completion")
    if (row := next((row for row in task.train if row["answer"]), None)) is not None:
        right, wrong = scored_samples(task, row)
        findings.append(
            f"{right.completion[:60]!r} scores {right.score:g} and {wrong.completion[:60]!r} {wrong.score:g}, as "
            "answers to one problem"
        )
    return {"checked": name, "findings": findings, "doubts": doubts(task)}
