"""`midtune probe`: rank the blocks of a model on a task, with intervals and costs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from midtune.config import RunConfig, dump_config
from midtune.errors import InputError
from midtune.model.configs import read_config
from midtune.model.sizes import sizes_of
from midtune.probe.methods import check_probe, rank_blocks
from midtune.probe.selection import parse_layers
from midtune.probe.trials import Runner, Trials, rows_of
from midtune.report.plots import contribution_curve
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.stages.at_work import at_work
from midtune.stages.ray_trials import connected, on_ray, open_probe


def run(
    config: RunConfig, *, out: Path | None, resume: Path | None, terminal: Terminal, on: str | None = None
) -> dict[str, Any]:
    """Rank the blocks of a model on a task and write probe.json (see `rank_blocks`) into a run folder.

    When resuming, `config` is the one in the folder. Without `out`, the folder is made under `runs/`. `on` names the
    Ray cluster that runs the trials (see `stages.ray_trials`); without it, this process runs them one by one.

    Raises:
        InputError: something asked for does not exist; nothing has been written.
        RunStopped: rewards never differ within a group, or disk or memory ran out.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; finished trials and checkpoints are kept.
    """
    if config.probe.method == "sweep" and config.model.quantize != "none":
        raise InputError(
            "a sweep compares each block with full training, which is unquantized, but frozen blocks would be in "
            f"{config.model.quantize}, so its runs would not start alike; add --quantize none."
        )
    opened = open_probe(config, terminal)
    task = opened.task
    name = f"probe-{Path(config.model.name).name}-{Path(task.name.rpartition(':')[2]).stem}"
    folder = RunFolder.create(out, name) if resume is None else RunFolder.resumed(resume, "probe")
    with (
        nullcontext() if on is None else connected(on, config.model.device) as room,
        at_work(folder, "probe"),
    ):
        source, trusted = opened.source, config.model.trust_remote_code
        sizes = sizes_of(
            read_config(source.folder, source.name, trust_remote_code=trusted), trust_remote_code=trusted
        )
        layers = f"0-{sizes.blocks - 1}" if config.probe.layers is None else config.probe.layers
        blocks = parse_layers(layers, sizes.blocks, config.blocks.top_k)
        check_probe(sizes, task, config, blocks, folder)
        if room is None:
            policy = opened.policy()
            execute = Runner(opened.sampler(policy), task, config, terminal).in_turn(folder)
        if resume is None:
            folder.begin(dump_config(config), on or policy.computes, config.seed)
        if room is not None:
            execute = on_ray(room, opened, folder)
        problems = len(rows_of(task, config)[1])
        trials = Trials(execute, config, sizes.blocks, problems, folder, terminal)
        probe = rank_blocks(trials, source, task, blocks)
        folder.write_json(folder.probe, probe)
        contribution_curve(probe, folder.depth_curve)
        terminal.message(f"run folder: {folder}")
        return probe
