"""One's own Python: a reward with TRL's signature, or a whole task in one file.

A task file defines:

- `rows()`, a list of dicts with `prompt` (a text or chat messages) and, if known, `answer`; midtune holds some
  out. Or `train_rows()` and `eval_rows()`, taken as they are. Other keys go to the reward. Each call must return
  the same rows, or a run cannot be resumed.
- a class `Environment`, if the task is played in turns (`environment.py`).
- `reward(prompts, completions, **columns) -> list[float]`, TRL's signature: `columns` has a list for each key of
  the rows, with values unchanged. Optional; without it answers are compared as for a data file.

    def rows():
        return [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(30) for b in range(30)]

    def reward(prompts, completions, answer, **columns):
        return [float(c[-1]["content"].strip() == a) for c, a in zip(completions, answer)]

A reward for a data file gets the file's columns the same way. If they lack `question` or `answer`, it gets the ones
that midtune read from the row, as text.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from midtune.errors import WHY, InputError, explained
from midtune.tasks.environment import CLASS
from midtune.tasks.rewards import Reward, named
from midtune.tasks.sources.columns import PLACE
from midtune.tasks.sources.files import Line, Source, line_of
from midtune.tasks.split import Row

# What TRL passes to a reward besides the columns of the data.
TRL_NAMES = "prompts completions completion_ids trainer_state log_extra log_metric environments".split()
ROWS = "`rows()`, or `train_rows()` and `eval_rows()`"


@dataclass(frozen=True)
class OwnTask:
    """What a task file defines; the source's digest covers the file and its rows."""

    source: Source
    reward: Reward | None
    environment: Any = None


def is_own(reward: str) -> bool:
    """Whether a reward's name has the form of a file and a function."""
    return ":" in reward or reward.endswith(".py")


def load_reward(reward: str) -> tuple[Reward, str]:
    """Load the reward `path/to/file.py:function`, with a digest of both; InputError if there is none to import."""
    file, _, function = reward.rpartition(":") if not reward.endswith(".py") else (reward, "", "")
    path, content, module = _imported(file, "reward", "write the reward as path/to/file.py:function")
    found = getattr(module, function, None) if function else None
    if not callable(found):
        asked = f"no function `{function}`" if function else "been named without a function"
        raise InputError(
            f"reward file {path} has {asked}; its functions are {_functions(module)}: write {path}:FUNCTION."
        )
    return accepting(found, function), hashlib.sha256(content + function.encode()).hexdigest()


def is_task_file(name: str) -> bool:
    """Whether a task's name has the form of a Python file."""
    return name.endswith(".py")


def load_own_task(name: str) -> OwnTask:
    """Load the rows, the reward and the environment of a task file; InputError if it or its rows cannot be read."""
    path, content, module = _imported(name, "task", f"give the path of a Python file that defines {ROWS}")
    together = callable(getattr(module, "rows", None))
    apart = all(callable(getattr(module, name, None)) for name in ("train_rows", "eval_rows"))
    if together == apart:
        has = "both" if together else f"neither; its functions are {_functions(module)}"
        raise InputError(f"task file {path} has to define {ROWS}, and it has {has}.")
    lines = _lines(path, module, "rows" if together else "train_rows")
    evaluation = None if together else _lines(path, module, "eval_rows")
    reward = getattr(module, "reward", None)
    if reward is not None and not callable(reward):
        raise InputError(
            f"`reward` of {path} is not a function; write `def reward(prompts, completions, **columns)`."
        )
    # Rows may come from elsewhere than the file.
    rows = repr([line.row for line in [*lines, *(evaluation or [])]])
    digest = hashlib.sha256(content + rows.encode("utf-8", "surrogatepass")).hexdigest()
    source = Source(str(path), lines, evaluation, digest)
    return OwnTask(source, reward and accepting(reward, "reward"), getattr(module, CLASS, None))


def _lines(path: Path, module: ModuleType, function: str) -> list[Line]:
    asked = f"`{function}()` of {path}"
    with explained(f"{asked} raised {WHY}; fix it.", with_kind=True):
        found = list(getattr(module, function)())
    if not found:
        raise InputError(f"{asked} gave no rows; it must return a list of dicts with `prompt`.")
    return [line_of(f"row {number} of {asked}", row, "a dict") for number, row in enumerate(found, start=1)]


def accepting(function: Callable[..., Any], name: str) -> Reward:
    """Pass the function only keyword arguments that it takes; stand-ins replace TRL's own outside training."""
    taken = inspect.signature(function).parameters
    takes_all = any(it.kind is it.VAR_KEYWORD for it in taken.values())
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [key for key, it in taken.items() if it.default is it.empty and it.kind not in open_ended]

    def reward(**columns: Any) -> list[float]:
        stand_ins = {
            "completion_ids": [[] for _ in columns.get("completions", [])],
            "trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
            "log_extra": lambda *values: None,
            "log_metric": lambda *values: None,
        }
        available = stand_ins | columns
        if missing := [key for key in needed if key not in available]:
            known = ", ".join(f"`{column}`" for column in columns if column not in TRL_NAMES) or "none"
            hint = "take one of these, or give it a default"
            if missing[0] in ("tokenizer", "processing_class", "model", "processor"):
                hint = "load it in the reward's own file, such as with transformers' AutoTokenizer.from_pretrained"
            raise InputError(
                f"the reward `{name}` asks for `{missing[0]}`, which is no column of the data (they are {known}), and "
                f"TRL passes only {', '.join(f'`{passed}`' for passed in TRL_NAMES[:-1])} besides; {hint}."
            )
        values = function(**{key: available[key] for key in available if takes_all or key in taken})
        if inspect.iscoroutine(values):
            values = asyncio.run(values)
        return values.tolist() if hasattr(values, "tolist") else values

    return named(reward, name)


def with_own_columns(reward: Reward, rows: Sequence[Row]) -> Reward:
    """Give a reward the rows' columns as the file has them, found by `row`, because trainers' tables change types."""
    if not rows:
        return reward
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in TRL_NAMES]

    def own(**columns: Any) -> list[float]:
        places = columns.pop(PLACE)
        given = {name: [rows[place].get(name) for place in places] for name in names}
        return reward(**columns | given)

    return named(own, reward.__name__)


def _imported(file: str, what: str, hint: str) -> tuple[Path, bytes, ModuleType]:
    """Import a Python file; return its path, content and module."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"{what} file {path} does not exist; {hint}.")
    content = path.read_bytes()
    digest = hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:12]
    name = f"midtune_{what}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what} file {path} is not a Python file; give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by name
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a person's file can raise anything)
        del sys.modules[name]
        raise InputError(
            f"{what} file {path} does not import ({type(error).__name__}: {error}); fix it and try again."
        ) from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    return path, content, module


def _functions(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    return ", ".join(f"`{name}`" for name in names) or "none"
