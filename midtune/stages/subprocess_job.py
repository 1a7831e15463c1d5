"""Run a job in its own process, because peak memory counts all that a process ever held."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from midtune.errors import MidtuneError

# Full-training steps measured for a report.
FULL_STEPS = 2
# What a job prints after this is for people, at once.
_SAID = "midtune says: "


def say(text: str) -> None:
    """In a job: tell people how far it is."""
    print(_SAID + text, flush=True)


def in_own_process(
    job: str,
    arguments: dict[str, Any],
    *,
    what: str,
    instead: str,
    on_message: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Call the function `job` (`module:name`) in a fresh process; arguments and result must be JSON.

    `on_message` receives what the job has to `say`. Raises MidtuneError if `what` failed, with the last line of output
    and the suggestion `instead`.
    """
    command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, job]
    last = ""
    with tempfile.TemporaryFile("w+") as complaints, tempfile.TemporaryFile("w+") as asked:
        json.dump(arguments, asked)
        asked.seek(0)
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as child:
            try:
                for line in child.stdout or ():
                    if not line.startswith(_SAID):
                        last = line if line.strip() else last
                    elif on_message is not None:
                        on_message(line.removeprefix(_SAID).rstrip())
            except BaseException:
                child.kill()
                raise
        complaints.seek(0)
        words = complaints.read().strip().splitlines()
    if child.returncode == -signal.SIGKILL:
        raise MidtuneError(f"{what} failed (it was killed, most likely because memory ran out); {instead}.")
    if child.returncode != 0:
        raise MidtuneError(f"{what} failed ({words[-1][:200] if words else child.returncode}); {instead}.")
    result: dict[str, Any] = json.loads(last)
    return result


def full_training_of(config_file: str, prompts: int) -> dict[str, Any]:
    """Measure a few steps of full training, of `prompts` prompts each; see `bench.arms.full_training`."""
    from midtune.bench.arms import full_training
    from midtune.config import load_config
    from midtune.device import compute_dtype, resolve_device
    from midtune.report.terminal import Terminal
    from midtune.stages.opening import Opened

    config = load_config(Path(config_file), {"training.prompts_per_step": prompts})
    opened = Opened(config, Terminal(quiet=True))
    task = opened.task
    device = resolve_device(config.model.device)
    return full_training(
        opened.source,
        task.train,
        task.reward,
        config.training,
        seed=config.seed,
        device=device,
        dtype=compute_dtype(config.model.dtype, device),
        steps=FULL_STEPS,
    )


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.load(sys.stdin))))
