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
    training = config.training
    batch = Batch(
        training.prompts_per_step,
        training.group_size,
        statistics.fmean(sampler.prompt_lengths(task.train[:64])),
        # In episodes, this includes what the environment showed.
        statistics.fmean(step["completion_length"] + step.get("shown_length", 0) for step in steps),
    )
    planner = planner_for(policy, policy.trained, process_bytes)
    # Without a KL term, groups of equal rewards are left out of the update.
    updated = 1.0 if training.beta > 0 else 1 - statistics.fmean(step["equal_groups"] for step in steps)
    kind = tail_kind(policy, policy.trained[0])
    phases = estimated_phases(arm, planner.sizes, batch, config, policy.trained, measured, updated, kind)
    mean = Work(config, math.ceil(batch.prompt_tokens)).changed(
        {"training.max_new_tokens": max(math.ceil(batch.new_tokens), 2)}
    )
    found: dict[str, Any] = {"step": sum(phases.values()), "phases": phases, "peak": None, "note": ""}
    found["libraries"] = planner.process
    try:
        found["peak"] = peak(planner.phases(arm, mean))[1]
    except MidtuneError as error:
        # The run is done, and its report has the rest.
        found["note"] = sentence(str(error))
    return found


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
    flops = partial(
        update_flops,
        sizes,
        batch,
        tail=sizes.blocks - blocks[0],
        trained=len(blocks),
        recompute=config.training.recompute,
        reference=config.training.beta > 0,
        checked=config.training.lr == "auto",
        kind=kind,
    )
    ratio = flops(arm) / (flops("midtune") * max(updated_share, 1 / batch.prompts))
    return {
        "rollout": measured["rollout"],
        "reward": measured["reward"],
        "update": measured["update"] * ratio,
    }
