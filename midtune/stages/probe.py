"""`midtune probe`: rank the blocks of a model on a task, with intervals and prices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midtune.config import RunConfig, dump_config
from midtune.device import cuda_devices
from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.probe.methods import by_gradient, by_race, by_sweep, check_race
from midtune.probe.selection import best, middle, parse_layers
from midtune.report.plots import contribution_curve
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder, describe_environment
from midtune.stages.at_work import at_work
from midtune.stages.setup import open_policy, open_source, open_task
from midtune.tasks import Task

METHODS = {"race": by_race, "sweep": by_sweep, "gradient": by_gradient}


def run(config: RunConfig, *, out: Path | None, resume: Path | None, terminal: Terminal) -> dict[str, Any]:
    """Rank the blocks of a model on a task and write probe.json into a run folder of its own.

    Args:
        config: of a resumed probe, the one its folder holds.
        out: the probe's folder; None makes one under `runs/`.
        resume: the folder of a probe to go on with.

    Returns:
        What probe.json holds; see `probe_blocks`.

    Raises:
        InputError: something asked for does not exist; nothing has been written.
        RunStopped: the rewards do not tell completions apart, or there was no room to go on.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; what the trials have reached is kept.
    """
    method = config.probe.method
    if method == "sweep" and config.model.quantize != "none":
        raise InputError(
            "a sweep compares each block with full training, which is unquantized, but frozen blocks would be in "
            f"{config.model.quantize}, so its runs would not start alike; add --quantize none."
        )
    # A race scores on problems of its own.
    task = open_task(config, terminal, more=config.task.eval_size if method == "race" else 0)
    name = f"probe-{Path(config.model.name).name}-{Path(task.name.rpartition(':')[2]).stem}"
    folder = RunFolder.open(resume) if resume is not None else RunFolder.create(out, name)
    if resume is not None and folder.is_training:
        raise InputError(
            f"{folder} was made by `midtune train`, not by `midtune probe`; go on with "
            f"`midtune train --resume {folder}`."
        )
    with at_work(folder, "probe"):
        return _run(config, task, folder, resume is not None, terminal)


def _run(
    config: RunConfig, task: Task, folder: RunFolder, resumed: bool, terminal: Terminal
) -> dict[str, Any]:
    method = config.probe.method
    policy = open_policy(config, open_source(config, terminal), terminal)
    blocks = (
        parse_layers(config.probe.layers, policy.num_blocks, config.blocks.top_k)
        if config.probe.layers is not None
        else list(range(policy.num_blocks))
    )
    best(blocks, policy.num_blocks, config.blocks.top_k)
    if method == "race":
        check_race(policy, task, config, blocks, folder)
    if not resumed and method != "gradient":
        # From here on there is something to resume.
        _describe(folder, config, policy)
    probe = probe_blocks(policy, task, config, blocks, folder, terminal)
    if method == "gradient":
        _describe(folder, config, policy)
    folder.write_json(folder.probe, probe)
    contribution_curve(probe, folder.depth_curve)
    terminal.message(f"run folder: {folder}")
    return probe


def _describe(folder: RunFolder, config: RunConfig, policy: Policy) -> None:
    folder.write_json(folder.environment, describe_environment(policy.computes, config.seed))
    folder.write_config(dump_config(config))


def probe_blocks(
    policy: Policy,
    task: Task,
    config: RunConfig,
    blocks: Sequence[int],
    folder: RunFolder,
    terminal: Terminal,
) -> dict[str, Any]:
    """Rank `blocks` as `config.probe` says; the policy and torch's random state are as they were afterwards.

    `score`, `low` and `high` are, by the methods `race` and `sweep`, what a run of the block gained; by the
    method `gradient`, the unbiased squared norm of its reward gradient, while ranks are by position. Gains are
    those of samples at the training temperature, which is what training maximises and shows a gain sooner than
    greedy completions do; the greedy ones stand beside them. `step_cost` is seconds of a training step: measured
    by `race` and `sweep`; by `gradient` the measured time of sampling and rewards, plus an update that is measured
    at the lowest, middle and highest block and interpolated between.

    Args:
        policy: with no trained blocks.
        blocks: block numbers, at least `config.blocks.top_k` of them.
        folder: where trials are recorded.

    Returns:
        What probe.json holds. `contribution` is null except by `sweep`: it takes full training to know. The
        geometric middle block is measured in any case, as `depth_baseline`: a ranking has to beat it.

    Raises:
        InputError: more blocks are to be selected than ranked, or the task has too few problems.
        RunStopped: the rewards do not tell completions apart.
    """
    import torch

    assert not policy.trained, f"blocks {policy.trained} are being trained, and a probe would drop them"
    best(blocks, policy.num_blocks, config.blocks.top_k)
    baseline = middle(policy.num_blocks, 1)[0]
    measured = sorted({*blocks, baseline})
    started = time.perf_counter()
    with torch.random.fork_rng(devices=cuda_devices(policy.device)):
        found = METHODS[config.probe.method](policy, task, config, measured, folder, terminal)
    rows = [row for row in found.rows if row["block"] in blocks]
    if config.probe.objective == "gain-per-second":
        # Only blocks that did as many steps can be compared.
        rows = sorted(rows, key=lambda row: (-row.get("steps", 0), -row["score"] / row["step_cost"]))
    return {
        "schema": 1,
        "model": policy.source.name,
        "revision": policy.source.revision,
        "num_blocks": policy.num_blocks,
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "method": config.probe.method,
        "objective": config.probe.objective,
        "seed": config.seed,
        "seeds": config.probe.seeds if config.probe.method == "sweep" else 1,
        "settings": found.settings,
        "cost_seconds": time.perf_counter() - started,
        **found.extra,
        "blocks": sorted(
            ({**row, "rank": rank} for rank, row in enumerate(rows, 1)), key=lambda row: row["block"]
        ),
        "among_best": (
            sorted(row["block"] for row in rows if row["among_best"]) if "among_best" in rows[0] else None
        ),
        "selected": best([row["block"] for row in rows], policy.num_blocks, config.blocks.top_k),
        "depth_baseline": {
            "block": baseline,
            "score": next(row["score"] for row in found.rows if row["block"] == baseline),
        },
    }
