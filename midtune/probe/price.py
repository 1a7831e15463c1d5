"""What training one block costs, by its depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.rl.tail import completion_log_probs
from midtune.rollout.boundary import recompute
from midtune.rollout.sampling import Rollout


def update_seconds(
    policy: Policy, rollout: Rollout, blocks: Sequence[int], *, temperature: float, groups_per_pass: int
) -> dict[int, float]:
    """Seconds per prompt that training one block spends on log-probs and their backward pass.

    Measured for the lowest, the middle and the highest of `blocks`, each thawed for it and frozen again, and
    interpolated linearly in depth between them: every block above the trained one costs the same. The
    optimizer's own step is left out.

    Args:
        rollout: whole groups, a typical sample of those that training will see.
        groups_per_pass: groups of one backward pass in training.
    """
    ordered = sorted(set(blocks))
    measured = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    part = rollout.groups(0, groups_per_pass)
    # The first pass of a kind pays for what later ones reuse, so the cheapest one is done once for nothing.
    _one_update(policy, part, measured[-1], temperature)
    seconds = [_one_update(policy, part, block, temperature) for block in measured]
    per_prompt = np.array(seconds) / part.prompt_ids.size(0)
    return {block: float(np.interp(block, measured, per_prompt)) for block in ordered}


def _one_update(policy: Policy, part: Rollout, block: int, temperature: float) -> float:
    boundary = recompute(
        policy, block, part.prompt_ids, part.prompt_mask, part.completion_ids, part.completion_mask
    )
    meter = Meter(policy.device)
    policy.thaw(block)
    try:
        with torch.enable_grad(), meter.phase("update"):
            log_probs, _ = completion_log_probs(
                policy, replace(part, boundary=boundary), temperature=temperature
            )
            log_probs.sum().backward()
    finally:
        policy.freeze(block)
    return meter.step()["update"]
