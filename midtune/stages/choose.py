"""Which blocks `midtune train` trains: named, from a ranking, or the geometric middle."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from midtune.config import BlocksConfig, RunConfig
from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.probe.selection import (
    best,
    matching_probe,
    middle,
    parse_layers,
    ranking_of,
    read_probe,
    worst,
)
from midtune.report.terminal import Terminal
from midtune.runs import RUNS
from midtune.tasks import Task


def choose_blocks(
    config: RunConfig, policy: Policy, task: Task, terminal: Terminal
) -> tuple[RunConfig, str, Path | None]:
    """The configuration with its blocks written out, how they were chosen, and the probe.json that did."""
    wanted = config.blocks
    ranking = None
    if wanted.layers is not None:
        blocks = parse_layers(wanted.layers, policy.num_blocks, wanted.top_k)
        how = f"--layers {wanted.layers}"
    elif wanted.select == "middle":
        blocks = middle(policy.num_blocks, wanted.top_k)
        how = "the geometric middle, as asked"
    elif (found := _ranking(wanted, policy, task)) is not None:
        file, probe = found
        ranking = file.absolute()
        choose = worst if wanted.select == "worst" else best
        blocks = choose(ranking_of(probe), policy.num_blocks, wanted.top_k)
        how = f"the ranking of {file} ({probe['method']})"
    elif wanted.select == "best":
        blocks = middle(policy.num_blocks, wanted.top_k)
        how = "the geometric middle: `midtune probe` has not ranked the blocks for this model and task"
    else:
        raise InputError(
            f"--select {wanted.select} needs a ranking of all blocks, and none under {RUNS} is about this model and "
            "task; make one with `midtune probe`, or name the blocks with --layers."
        )
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
    return config.model_copy(update={"blocks": chosen}), how, ranking


def _ranking(wanted: BlocksConfig, policy: Policy, task: Task) -> tuple[Path, dict[str, Any]] | None:
    """A probe.json, the one named or else the newest that fits, and its file."""
    if wanted.probe is not None:
        return _given_ranking(wanted.probe, policy, task)
    return _latest_ranking(policy, task, wanted.top_k)


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
    files = RUNS.glob("*/probe.json")
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(InputError):
            probe = read_probe(file)
            if _matches(probe, policy, task) and len(ranking_of(probe)) >= top_k:
                return file, probe
    return None
