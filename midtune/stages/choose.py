"""Which blocks `midtune train` trains: named, from a ranking, or probed first."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.probe.selection import (
    best,
    matching_probe,
    middle,
    middle_band,
    parse_layers,
    ranking_of,
    read_probe,
    worst,
)
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
    elif wanted.select == "middle":
        blocks = middle(policy.num_blocks, wanted.top_k)
        how = "the geometric middle, without a probe"
    else:
        probe, how = _ranking(config, policy, task, folder, terminal)
        choose = worst if wanted.select == "worst" else best
        blocks = choose(ranking_of(probe), policy.num_blocks, wanted.top_k)
    names = f"{'block' if len(blocks) == 1 else 'blocks'} {', '.join(map(str, blocks))}"
    if wanted.select == "boost":
        terminal.message(
            f"training all {policy.num_blocks} blocks, unquantized, {names} at {wanted.boost:g} times the learning "
            f"rate ({how}); it takes about the time and memory of full training"
        )
        how = f"boost of {names} by {wanted.boost:g}: {how}"
    else:
        how = f"the worst of {how}" if wanted.select == "worst" and wanted.layers is None else how
        terminal.message(f"training {names} ({how})")
    layers = ",".join(map(str, blocks))
    chosen = wanted.model_copy(update={"layers": layers, "top_k": len(blocks), "probe": None})
    return config.model_copy(update={"blocks": chosen}), how


def _ranking(
    config: RunConfig, policy: Policy, task: Task, folder: RunFolder, terminal: Terminal
) -> tuple[dict[str, Any], str]:
    """A probe.json and where it is from: the one named, the newest that fits, or one made now."""
    wanted = config.blocks
    found = (
        _latest_ranking(policy, task, wanted.top_k)
        if wanted.probe is None
        else _given_ranking(wanted.probe, policy, task)
    )
    if found is not None:
        probe = found[1]
        return probe, f"the ranking of {found[0]} ({probe['method']})"
    if wanted.select != "best":
        raise InputError(
            f"--select {wanted.select} needs a ranking of all blocks, and none under {RUNS} is about this model and "
            "task; make one with `midtune probe`, or name the blocks with --layers."
        )
    band = middle_band(policy.num_blocks, at_least=wanted.top_k)
    terminal.message(
        f"no probe for this model and task: ranking blocks {band[0]} to {band[-1]} by reward gradient"
    )
    # Trials would cost as much as the training itself; they are asked for with `midtune probe`.
    gradient = config.probe.model_copy(update={"method": "gradient"})
    probe = probe_blocks(policy, task, config.model_copy(update={"probe": gradient}), band, folder, terminal)
    folder.write_json(folder.probe, probe)
    return probe, f"gradient probe of blocks {band[0]}-{band[-1]}"


def _given_ranking(file: Path, policy: Policy, task: Task) -> tuple[Path, dict[str, Any]]:
    probe = read_probe(file)
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
            probe = read_probe(file)
            if _matches(probe, policy, task) and len(ranking_of(probe)) >= top_k:
                return file, probe
    return None
