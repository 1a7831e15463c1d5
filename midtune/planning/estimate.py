"""Estimates full training and QLoRA on the steps of a run, from what the run measured.

The references are TRL's GRPOTrainer on the whole model, or with LoRA on every linear layer, with its defaults:
gradient checkpointing, every prompt repeated for each completion, a second forward pass as the reference if there is
a KL term. Whatever the formulas omit makes them look cheaper than they are, never dearer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from midtune.bench.flops import Batch, update_flops
from midtune.config import RunConfig
from midtune.errors import MidtuneError
from midtune.model.sizes import Sizes
from midtune.planning.budget import peak
from midtune.planning.search import planner_for
from midtune.planning.step_size import Work
from midtune.report.formats import sentence
from midtune.rl.tail import SHARED, tail_kind
from midtune.rollout.sampling import Sampler
from midtune.tasks import Task


def estimated(
    arm: str,
    config: RunConfig,
    sampler: Sampler,
    task: Task,
    steps: Sequence[Mapping[str, Any]],
    *,
    measured: Mapping[str, float],
    process_bytes: int,
) -> dict[str, Any]:
    """Seconds of a `step` and of its `phases`, `peak` bytes and the `libraries`' in it, of TRL on a run's steps.

    Memory is for completions of the mean length, though TRL pads to the longest of a step. If the architecture cannot
    run on tensors without data, `peak` is None and `note` says why. `steps` are the run's lines of
    metrics.jsonl, `measured` its mean seconds of each phase. `process_bytes` is resident memory before the model was
    loaded; on a CPU peaks include it.
    """
    policy = sampler.policy
    batch, mean = mean_step(config, sampler, task, steps)
    planner = planner_for(policy, policy.trained, process_bytes)
    # Without a KL term, groups of equal rewards are left out of the update.
    updated = (
        1.0 if config.training.beta > 0 else 1 - statistics.fmean(step["equal_groups"] for step in steps)
    )
    kind = tail_kind(policy, policy.trained[0])
    phases = estimated_phases(arm, planner.sizes, batch, config, policy.trained, measured, updated, kind)
    found: dict[str, Any] = {"step": sum(phases.values()), "phases": phases, "peak": None, "note": ""}
    found["libraries"] = planner.process
    try:
        found["peak"] = peak(planner.phases(arm, mean))[1]
    except MidtuneError as error:
        # The run is done, and its report has the rest.
        found["note"] = sentence(str(error))
    return found


def mean_step(
    config: RunConfig, sampler: Sampler, task: Task, steps: Sequence[Mapping[str, Any]]
) -> tuple[Batch, Work]:
    """The mean step of a run, in tokens as they were, and as a step to plan memory for."""
    batch = Batch(
        config.training.prompts_per_step,
        config.training.group_size,
        statistics.fmean(sampler.prompt_lengths(task.train[:64])),
        # In episodes, this includes what the environment showed.
        statistics.fmean(step["completion_length"] + step.get("shown_length", 0) for step in steps),
    )
    changes = {"training.max_new_tokens": max(math.ceil(batch.new_tokens), 2)}
    return batch, Work(config, math.ceil(batch.prompt_tokens)).changed(changes)


def one_more_block(
    config: RunConfig,
    sampler: Sampler,
    task: Task,
    steps: Sequence[Mapping[str, Any]],
    *,
    measured: Mapping[str, float],
) -> dict[str, Any] | None:
    """What one more block would cost on a run's steps: its number, further seconds of a `step` and bytes of the `peak`.

    It is the block below the first trained one, which makes the tail longer, or without one that above the last. None
    if all are trained, if LoRA is, which plans do not know, or if the architecture cannot run on tensors without data.
    For the others see `estimated`.
    """
    policy = sampler.policy
    blocks = sorted(policy.trained)
    block = blocks[0] - 1 if blocks[0] > 0 else blocks[-1] + 1
    if block == policy.num_blocks or policy.adapter is not None:
        return None
    wider = sorted([*blocks, block])
    batch, mean = mean_step(config, sampler, task, steps)
    before, after = (planner_for(policy, own, 0) for own in (blocks, wider))
    kind = tail_kind(policy, wider[0])
    flops = partial(_update_flops, "midtune", before.sizes, batch, config, kind=kind)
    try:
        more = peak(after.phases("midtune", mean))[1] - peak(before.phases("midtune", mean))[1]
    except MidtuneError:
        return None
    return {"block": block, "step": measured["update"] * (flops(wider) / flops(blocks) - 1), "peak": more}


def estimated_phases(
    arm: str,
    sizes: Sizes,
    batch: Batch,
    config: RunConfig,
    blocks: Sequence[int],
    measured: Mapping[str, float],
    updated_share: float,
    kind: str = SHARED,
) -> dict[str, float]:
    """Seconds of the phases `rollout`, `reward` and `update` of TRL on the same step.

    Sampling and rewards are midtune's `measured` seconds, though TRL's sampling is slower: it runs every prompt once
    per completion. Dequantizing a 4-bit layer for each product is not counted either. `updated_share` is the fraction
    of groups in midtune's update of `blocks`, which may skip groups of equal rewards; `kind` is that of its tail.
    """
    flops = partial(_update_flops, sizes=sizes, batch=batch, config=config, blocks=blocks, kind=kind)
    ratio = flops(arm) / (flops("midtune") * max(updated_share, 1 / batch.prompts))
    return {
        "rollout": measured["rollout"],
        "reward": measured["reward"],
        "update": measured["update"] * ratio,
    }


def _update_flops(
    arm: str, sizes: Sizes, batch: Batch, config: RunConfig, blocks: Sequence[int], kind: str
) -> float:
    """Operations of an arm's update in a step of the configuration; `kind` is that of midtune's tail."""
    training = config.training
    return update_flops(
        sizes,
        batch,
        arm,
        tail=sizes.blocks - blocks[0],
        trained=len(blocks),
        recompute=training.recompute,
        reference=training.beta > 0,
        checked=training.lr == "auto",
        kind=kind,
    )
