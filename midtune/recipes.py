"""The recipes that midtune brings: `recipes/` of the repository, or the package's own copy of it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from midtune.errors import InputError

_HERE = Path(__file__).parent
# Of an installed package, and of a checkout.
_FOLDERS = (_HERE / "assets" / "recipes", _HERE.parent / "recipes")


def recipes() -> dict[str, Path]:
    """Name → file of each recipe that midtune brings."""
    for folder in _FOLDERS:
        if files := sorted(folder.glob("*.yaml")):
            return {file.stem: file for file in files}
    return {}


def recipe_file(given: Path) -> Path:
    """The file of a recipe given by path or name, `recipes/NAME.yaml` included; raises InputError without one."""
    if os.path.isfile(given):
        return given
    known = recipes()
    name = str(given).removeprefix("recipes" + os.sep).removesuffix(".yaml")
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5)
    names = f"a name such as {' or '.join(near)}" if near else "a name that `midtune recipes` lists"
    raise InputError(f"recipe {given} does not exist; give {names}, or the path of a YAML file.")


def beside(value: Any, folder: Path) -> Any:
    """A file's name, such as `rewards.py` or `rewards.py:function`, or a list of them.

    It becomes a path in `folder` if the file is there and not in the working directory.
    """
    if isinstance(value, list):
        return [beside(each, folder) for each in value]
    if not isinstance(value, str):
        return value
    file, sign, function = value.partition(":")
    there = folder / file
    return f"{there}{sign}{function}" if os.path.isfile(there) and not os.path.exists(file) else value
