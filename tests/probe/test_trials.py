from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.probe.trials import Trial, single_block_trials, update_seconds
from midtune.rollout.sampler import Sampling, sample


@pytest.fixture
def policy(random_checkpoint: Callable[..., Path]) -> Policy:
    return load_policy(resolve(str(random_checkpoint("qwen3"))), device="cpu")


def nudge(policy: Policy, seed: int) -> float:
    """Training that leaves a mark on the block."""
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.add_(seed)
    return 0.5


def scores(policy: Policy) -> NDArray[np.float64]:
    return np.array([0.0, 1.0 if policy.trained == [2] else 0.0])


def test_each_trial_starts_from_the_same_policy(policy: Policy) -> None:
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    started: list[tuple[list[int], int, float]] = []
    told: list[Trial] = []

    def train(policy: Policy, seed: int) -> float:
        started.append((policy.trained, seed, float(policy.blocks[1].mlp.up_proj.weight.float().sum())))
        return nudge(policy, seed)

    base, trials = single_block_trials(
        policy, [3, 2], train=train, evaluate=scores, seed=7, on_trial=told.append
    )

    assert [(blocks, seed) for blocks, seed, _ in started] == [([3], 7), ([2], 7)]
    assert started[0][2] == started[1][2]
    assert base.tolist() == [0, 0]
    assert [(trial.block, trial.scores.tolist(), trial.step_seconds) for trial in trials] == [
        (3, [0, 0], 0.5),
        (2, [0, 1], 0.5),
    ]
    assert told == trials
    after = policy.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_failed_trial_leaves_the_policy_frozen(policy: Policy) -> None:
    frozen = policy.blocks[1]

    def fail(policy: Policy, seed: int) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        single_block_trials(policy, [1], train=fail, evaluate=scores, seed=0)
    assert policy.blocks[1] is frozen
    assert policy.trained == []


def test_updates_are_timed_at_three_depths_and_interpolated(policy: Policy) -> None:
    torch.manual_seed(0)
    rollout = sample(policy, [[5, 6], [7]], Sampling(max_new_tokens=4), group_size=2)
    frozen = list(policy.blocks)

    seconds = update_seconds(policy, rollout, [0, 1, 2, 3], temperature=1.0, groups_per_pass=8)

    assert sorted(seconds) == [0, 1, 2, 3]
    assert all(value > 0 for value in seconds.values())
    assert seconds[1] == pytest.approx((seconds[0] + seconds[2]) / 2)
    assert all(now is then for now, then in zip(policy.blocks, frozen, strict=True))
    assert update_seconds(policy, rollout, [2], temperature=1.0, groups_per_pass=1).keys() == {2}
