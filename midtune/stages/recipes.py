"""`midtune recipes`: list the recipes that midtune brings, show one, or copy one to start from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from midtune.config import load_config
from midtune.errors import InputError
from midtune.recipes import recipe_file, recipes
from midtune.report.terminal import Terminal
from midtune.whole import require_writable


def run(action: str | None, name: Path | None, *, out: Path | None, terminal: Terminal) -> dict[str, Any]:
    """List the recipes, or `show` or `copy` one; `out` is the copy's file, by default its name in this folder.

    A task file that lies beside a recipe is copied with it.

    Returns:
        Without an action, `recipes`: each with `name`, `model`, `task`, `about`, and what was `measured` with it (null:
        not run yet). Of `show`, the `file` and its `text`; of `copy`, `copied`: the files written.

    Raises InputError for another action, an unknown recipe, or a file that exists already.
    """
    if action is None:
        return {"recipes": [_described(name, file) for name, file in recipes().items()]}
    if action not in ("show", "copy") or name is None:
        raise InputError(
            f"`midtune recipes {action}` is unclear; write `midtune recipes show NAME` or `midtune recipes copy NAME`."
        )
    file = recipe_file(name)
    if action == "show":
        return {"file": str(file), "text": file.read_text(encoding="utf-8")}
    copies = {file: out or Path(file.name)}
    task = load_config(file, {}).task.name
    if task is not None and Path(task).suffix == ".py" and Path(task).parent == file.parent:
        copies[Path(task)] = copies[file].parent / Path(task).name
    for copy in copies.values():
        if copy.exists():
            raise InputError(f"{copy} exists already; choose another file with --out.")
        require_writable(copy)
    for original, copy in copies.items():
        shutil.copyfile(original, copy)
    return {"copied": [str(copy) for copy in copies.values()]}


def _described(name: str, file: Path) -> dict[str, Any]:
    config, text = load_config(file, {}), file.read_text(encoding="utf-8")
    about = re.search(r"^# (?!midtune )(.+?)(?:(?<!Dr)\.\s|\n#\n|\n\w)", text, re.MULTILINE | re.DOTALL)
    measured = re.search(r"^# Measured: (.+)$", text, re.MULTILINE)
    return {
        "name": name,
        "model": config.model.name,
        "task": str(config.task.name).removeprefix(f"{file.parent}/"),
        "about": about[1].replace("\n# ", " ") if about else "",
        "measured": measured[1] if measured else None,
    }
