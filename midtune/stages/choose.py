"""Which blocks `midtune train` trains: named, from a ranking, or probed first."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.probe.selection import best, matching_probe, middle_band, parse_layers, ranking_of
from midtune.report.terminal import Terminal
from midtune.runs import RUNS, RunFolder
from midtune.stages.probe import probe_blocks
from midtune.tasks import Task


def choose_blocks(
    config: RunConfig, policy: Policy, task: Task, folder: RunFolder, terminal: Terminal
) -> tuple[RunConfig, str]:
    """The configuration with its blocks written out, and how they were chosen."""
    wanted = config.blocks
    if wanted.layers is not None:
        blocks = parse_layers(wanted.layers, policy.num_blocks, wanted.top_k)
        how = f"--layers {wanted.layers}"
    else:
        found = (
            _latest_ranking(policy, task, wanted.top_k)
            if wanted.probe is None
            else _given_ranking(wanted.probe, policy, task)
        )
        if found is not None:
            probe = found[1]
            how = f"the ranking of {found[0]} ({probe['method']})"
        else:
            band = middle_band(policy.num_blocks, at_least=wanted.top_k)
            terminal.message(
                f"no probe for this model and task: ranking blocks {band[0]} to {band[-1]} by reward gradient"
            )
            # Trials would cost as much as the training itself; they are asked for with `midtune probe`.
            gradient = config.probe.model_copy(update={"method": "gradient"})
            probe = probe_blocks(policy, task, config.model_copy(update={"probe": gradient}), band, terminal)
            folder.write_json(folder.probe, probe)
            how = f"gradient probe of blocks {band[0]}-{band[-1]}"
        blocks = best(ranking_of(probe), policy.num_blocks, wanted.top_k)
    terminal.message(
        f"training {'block' if len(blocks) == 1 else 'blocks'} {', '.join(map(str, blocks))} ({how})"
    )
    layers = ",".join(map(str, blocks))
    chosen = wanted.model_copy(update={"layers": layers, "top_k": len(blocks), "probe": None})
    return config.model_copy(update={"blocks": chosen}), how


def _given_ranking(file: Path, policy: Policy, task: Task) -> tuple[Path, dict[str, Any]]:
    probe = _read_probe(file)
    if not _matches(probe, policy, task):
        raise InputError(
            f"{file} ranks the blocks of {probe.get('model')} on {probe.get('task')}, not those of "
            f"{policy.source.name} on {task.name} as asked; probe again, or choose with --layers."
        )
    return file, probe


def _matches(probe: dict[str, Any], policy: Policy, task: Task) -> bool:
    return matching_probe(probe, policy.source.name, task.fingerprint, policy.source.revision)


def _latest_ranking(policy: Policy, task: Task, top_k: int) -> tuple[Path, dict[str, Any]] | None:
    """The newest fitting ranking that `midtune probe` left under `runs`, and its file."""
    # A training run's own ranking covers the middle only, and was meant for that run.
    files = [file for file in RUNS.glob("*/probe.json") if not RunFolder(file.parent).start.exists()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(InputError):
            probe = _read_probe(file)
            if _matches(probe, policy, task) and len(ranking_of(probe)) >= top_k:
                return file, probe
    return None


def _read_probe(path: Path) -> dict[str, Any]:
    try:
        probe: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        probe["blocks"], probe["method"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not a probe.json that can be read; make one with `midtune probe`."
        ) from None
    return probe
