"""Data files of the shapes that GSM8K, MATH and NuminaMath have, and `load_task` with its usual settings."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet

from midtune.config import TaskConfig
from midtune.tasks import Reward, Task, load_task
from midtune.tasks.sandbox.sandbox import Sandbox
from midtune.tasks.split import Row


def gsm8k(count: int, start: int = 0) -> list[Row]:
    """Rows of GSM8K's columns; the answer to problem n is n + 1."""
    return [
        {"question": f"Problem {n}?", "answer": f"It is <<{n}+1={n + 1}>>one more.\n#### {n + 1}"}
        for n in range(start, start + count)
    ]


# A dataset in two parts.
SPLITS = {"train": gsm8k(8), "test": gsm8k(4, start=20)}


def math(count: int, start: int = 0) -> list[Row]:
    """Rows of MATH's columns; the answer to problem n is n√2."""
    return [
        {
            "problem": f"Problem {n}?",
            "solution": rf"Since $x^2 = 2\cdot{n}^2$, $x = \boxed{{{n}\sqrt{{2}}}}$.",
        }
        for n in range(start, start + count)
    ]


def write(path: Path, rows: list[Row]) -> Path:
    """The rows as a file of the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(
    name: Path | str,
    *,
    seed: int = 0,
    sandbox: Sandbox | None = None,
    shaping: Callable[[str], Reward] | None = None,
    tools: Callable[..., Any] | None = None,
    **settings: Any,
) -> Task:
    """The task of that name, with three problems held out unless other settings are given."""
    config = TaskConfig.model_validate({"eval_size": 3, **settings})
    opened = None if sandbox is None else lambda: sandbox
    return load_task(str(name), config, seed, sandbox=opened, shaping=shaping, tools=tools)


def scores(task: Task, text: str) -> list[float]:
    """What the task's score gives the first two training rows for completions with `{n}` filled in."""
    rows = task.train[:2]
    numbers = [int(row["question"].split()[1].rstrip("?")) for row in rows]
    columns = {key: [row[key] for row in rows] for key in ("question", "answer")}
    completions = [text.replace("{n}", str(n)).replace("{n+1}", str(n + 1)) for n in numbers]
    return task.score(prompts=["", ""], completions=completions, **columns)
