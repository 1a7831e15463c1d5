"""Work in a process of its own, because peak memory counts all that a process ever held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from midtune.errors import MidtuneError


def in_own_process(module: str, file: Path, *, what: str, instead: str) -> dict[str, Any]:
    """Run `python -m MODULE FILE`; the last line it prints is a JSON object, which is returned.

    Args:
        what, instead: for the message, what was to be done and what a person can do without it.

    Raises:
        MidtuneError: the process failed; its last words are in the message.
    """
    finished = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", module, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if finished.returncode == -signal.SIGKILL:
        raise MidtuneError(f"{what} failed (it was killed, most likely because memory ran out); {instead}.")
    if finished.returncode != 0:
        words = finished.stderr.strip().splitlines()
        raise MidtuneError(f"{what} failed ({words[-1][:200] if words else finished.returncode}); {instead}.")
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result
