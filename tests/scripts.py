"""The scripts of recipes/results, which are no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "recipes/results"


def read_script(name: str) -> Any:
    """The module of a script, by its path under recipes/results without the ending."""
    spec = importlib.util.spec_from_file_location(Path(name).name, RESULTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script
