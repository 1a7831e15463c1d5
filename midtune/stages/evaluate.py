"""`midtune eval`: score a model, a run or a patch on a task's held-out problems."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.model.patch import DESCRIPTION, apply_patch, read_patch
from midtune.report.statistics import score_interval
from midtune.report.terminal import Terminal
from midtune.stages.setup import open_policy, open_source, open_task, score_policy, with_model


def run(target: str, config: RunConfig, *, terminal: Terminal) -> dict[str, Any]:
    """Score `target`.

    Args:
        target: a model as `train` takes it, a run folder, or a patch folder.
        config: of a run folder, the run's own with the command line's changes; its model is replaced by
            the one that the target names.

    Returns:
        `model`, `patch` (blocks or null), `task`, `quantize`, `greedy` and `sampled` scores with intervals.
    """
    patch_folder = patch_of(target)
    if patch_folder is not None:
        patch = read_patch(patch_folder)
        name, revision = patch.base_model, patch.revision
    else:
        name, revision = target, config.model.revision
    config = with_model(config, name, revision)
    task = open_task(config, terminal)
    policy = open_policy(config, open_source(config, terminal), terminal)
    blocks = apply_patch(policy, patch_folder).blocks if patch_folder is not None else None
    found = score_policy(policy, task, task.held_out, config, terminal, "scoring", config.evaluation.samples)
    return {
        "model": name,
        "patch": blocks,
        "task": task.name,
        "quantize": config.model.quantize,
        "greedy": asdict(score_interval(found.greedy)),
        "sampled": None if found.sampled is None else asdict(score_interval(found.sampled)),
    }


def patch_of(target: str) -> Path | None:
    """The patch folder of a run folder or patch folder; None for anything else.

    Raises:
        InputError: a run folder without a finished patch.
    """
    folder = Path(target)
    if (folder / DESCRIPTION).is_file():
        return folder
    if (folder / "config.yaml").is_file():
        if not (folder / "patch" / DESCRIPTION).is_file():
            raise InputError(
                f"{target} has no trained patch yet; finish it with `midtune train --resume {target}`."
            )
        return folder / "patch"
    return None
