"""One's own reward: a function in a Python file, with TRL's signature."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from midtune.errors import InputError
from midtune.tasks.rewards import Reward, named


def is_own(reward: str) -> bool:
    """Whether a reward's name has the form of a file and a function."""
    return ":" in reward or reward.endswith(".py")


def load_reward(reward: str) -> tuple[Reward, str]:
    """The reward `path/to/file.py:function`, and a digest of the file and the function's name.

    Raises:
        InputError: no such file or function, or the file does not import.
    """
    file, _, function = reward.rpartition(":") if not reward.endswith(".py") else (reward, "", "")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"reward file {path} does not exist; write the reward as path/to/file.py:function.")
    content = path.read_bytes()
    module = _imported(path, hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:12])
    found = getattr(module, function, None) if function else None
    if not callable(found):
        asked = f"no function `{function}`" if function else "been named without a function"
        raise InputError(
            f"reward file {path} has {asked}; its functions are {_functions(module)}: write {path}:FUNCTION."
        )
    digest = hashlib.sha256(content + function.encode()).hexdigest()
    return accepting(found, function), digest


def accepting(function: Callable[..., Any], name: str) -> Reward:
    """The function with only those keyword arguments passed that it can take.

    TRL always passes `completion_ids`, `trainer_state`, `log_extra` and `log_metric`; outside training
    they get stand-ins.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    taken = {parameter.name for parameter in parameters}

    def reward(**columns: Any) -> list[float]:
        available = {**_stand_ins(columns), **columns}
        passed = {key: value for key, value in available.items() if takes_all or key in taken}
        values = function(**passed)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        return values.tolist() if hasattr(values, "tolist") else values

    return named(reward, name)


async def _awaited(values: Any) -> Any:
    return await values


def _stand_ins(columns: dict[str, Any]) -> dict[str, Any]:
    return {
        "completion_ids": [[] for _ in columns.get("completions", [])],
        "trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
        "log_extra": lambda *values: None,
        "log_metric": lambda *values: None,
    }


def _imported(path: Path, digest: str) -> ModuleType:
    name = f"midtune_reward_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"reward file {path} is not a Python file; give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by name
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a person's file can raise anything)
        del sys.modules[name]
        raise InputError(
            f"reward file {path} does not import ({type(error).__name__}: {error}); mend it and try again."
        ) from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _functions(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    return ", ".join(f"`{name}`" for name in names) or "none"
