"""One block at a time: short RL runs from the same start, and what an update costs at each depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from midtune.model.policy import Policy
from midtune.rl.tail import completion_log_probs
from midtune.rollout.boundary import recompute
from midtune.rollout.sampler import Rollout
from midtune.savings.meter import Meter

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """What a short run of one block came to.

    Attributes:
        scores: [n], one per held-out problem, in the order of the base scores.
        step_seconds: seconds of a training step.
    """

    block: int
    scores: Scores
    step_seconds: float


def single_block_trials(
    policy: Policy,
    blocks: Sequence[int],
    *,
    train: Callable[[Policy, int], float],
    evaluate: Callable[[Policy], Scores],
    seed: int,
    on_trial: Callable[[Trial], None] | None = None,
) -> tuple[Scores, list[Trial]]:
    """Train each block alone for a few steps, score it, and put the frozen block back.

    Nothing carries over from one trial to the next: the block returns bit for bit, and `train` gets the same
    seed each time. A gain over the base is paired by problem, so the difficulty of problems cancels.
    It does not show how far a longer run would come, and a single seed does not show the spread over seeds.

    Args:
        policy: with no trained blocks; as it was afterwards.
        train: trains the thawed block of the policy with this seed → seconds per step.
        evaluate: → [n] scores of the same problems in the same order at every call.

    Returns:
        The scores before training, and the trials in the order of `blocks`.
    """
    base = evaluate(policy)
    trials = []
    for block in blocks:
        policy.thaw(block)
        try:
            step_seconds = train(policy, seed)
            trial = Trial(block, evaluate(policy), step_seconds)
        finally:
            policy.freeze(block)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
    return base, trials


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
