"""`midtune probe`: rank the blocks of a model on a task, with intervals and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midtune.config import RunConfig, dump_config
from midtune.errors import InputError
from midtune.probe.methods import check_probe, rank_blocks
from midtune.probe.selection import parse_layers
from midtune.report.plots import contribution_curve
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.stages.at_work import at_work
from midtune.stages.opening import Opened


def run(config: RunConfig, *, out: Path | None, resume: Path | None, terminal: Terminal) -> dict[str, Any]:
    """Rank the blocks of a model on a task and write probe.json (see `rank_blocks`) into a run folder.

    When resuming, `config` is the one in the folder. Without `out`, the folder is made under `runs/`.

    Raises:
        InputError: something asked for does not exist; nothing has been written.
        RunStopped: rewards never differ within a group, or disk or memory ran out.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; finished trials and checkpoints are kept.
    """
    method = config.probe.method
    if method == "sweep" and config.model.quantize != "none":
        raise InputError(
            "a sweep compares each block with full training, which is unquantized, but frozen blocks would be in "
            f"{config.model.quantize}, so its runs would not start alike; add --quantize none."
        )
    # A race scores on extra problems of its own.
    opened = Opened(config, terminal, more_problems=config.task.most_held_out if method == "race" else 0)
    task = opened.task
    name = f"probe-{Path(config.model.name).name}-{Path(task.name.rpartition(':')[2]).stem}"
    folder = RunFolder.create(out, name) if resume is None else RunFolder.resumed(resume, "probe")
    with at_work(folder, "probe"):
        policy = opened.policy()
        layers = f"0-{policy.num_blocks - 1}" if config.probe.layers is None else config.probe.layers
        blocks = parse_layers(layers, policy.num_blocks, config.blocks.top_k)
        check_probe(policy, task, config, blocks, folder)
        if resume is None:
            folder.begin(dump_config(config), policy.computes, config.seed)
        probe = rank_blocks(opened.sampler(policy), task, config, blocks, folder, terminal)
        folder.write_json(folder.probe, probe)
        contribution_curve(probe, folder.depth_curve)
        terminal.message(f"run folder: {folder}")
        return probe
