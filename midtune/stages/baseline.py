"""Full training for a few steps in a process of its own: `python -m midtune.stages.baseline RUN/config.yaml`.

A process of its own, because peak memory counts all that a process ever held.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from midtune.errors import MidtuneError

STEPS = 2


def measure(config_file: Path) -> dict[str, Any]:
    """Run full training as the configuration says, in a fresh process; see `rl.baselines.full_training`.

    Raises:
        MidtuneError: the process failed; its last words are in the message.
    """
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "midtune.stages.baseline", str(config_file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if finished.returncode != 0:
        words = finished.stderr.strip().splitlines()
        raise MidtuneError(
            f"full training could not be measured ({words[-1][:200] if words else finished.returncode}); "
            "use --baseline estimated."
        )
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result


def main(config_file: Path) -> None:
    """Measure here and print the figures as one line of JSON."""
    from midtune.config import load_config
    from midtune.model.loading import resolve_device
    from midtune.report.terminal import Terminal
    from midtune.rl.baselines import full_training
    from midtune.stages.setup import open_source, open_task

    terminal = Terminal(quiet=True)
    config = load_config(config_file, {})
    task = open_task(config, terminal)
    figures = full_training(
        open_source(config, terminal),
        task.train,
        task.reward,
        config.training,
        seed=config.seed,
        device=resolve_device(config.model.device),
        steps=STEPS,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
