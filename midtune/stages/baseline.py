"""Full training for a few steps in a process of its own: `python -m midtune.stages.baseline RUN/config.yaml`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from midtune.stages.alone import in_own_process

STEPS = 2


def measure(config_file: Path) -> dict[str, Any]:
    """Run full training as the configuration says, in a fresh process; see `rl.baselines.full_training`.

    Raises:
        MidtuneError: the process failed; its last words are in the message.
    """
    return in_own_process(
        __name__, config_file, what="measuring full training", instead="use --baseline estimated"
    )


def main(config_file: Path) -> None:
    """Measure here and print the figures as one line of JSON."""
    from midtune.bench.baselines import full_training
    from midtune.config import load_config
    from midtune.device import compute_dtype_of, dtype_named, resolve_device
    from midtune.report.terminal import Terminal
    from midtune.stages.opening import Opened

    config = load_config(config_file, {})
    opened = Opened(config, Terminal(quiet=True))
    task = opened.task
    device = resolve_device(config.model.device)
    figures = full_training(
        opened.source,
        task.train,
        task.reward,
        config.training,
        seed=config.seed,
        device=device,
        compute_dtype=dtype_named(config.model.dtype) or compute_dtype_of(device),
        steps=STEPS,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
