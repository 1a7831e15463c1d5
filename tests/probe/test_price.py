from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from midtune.model.policy import Policy
from midtune.probe.price import update_seconds
from midtune.rollout.sampling import Sampling
from midtune.rollout.text import sample


def test_updates_are_timed_at_three_depths_and_interpolated(load: Callable[..., Policy]) -> None:
    policy = load("qwen3")
    torch.manual_seed(0)
    rollout = sample(policy, [[5, 6], [7]], Sampling(max_new_tokens=4), group_size=2)
    frozen = list(policy.blocks)

    seconds = update_seconds(policy, rollout, [0, 1, 2, 3], temperature=1.0, groups_per_pass=8)

    assert sorted(seconds) == [0, 1, 2, 3]
    assert all(value > 0 for value in seconds.values())
    assert seconds[1] == pytest.approx((seconds[0] + seconds[2]) / 2)
    assert all(now is then for now, then in zip(policy.blocks, frozen, strict=True))
    assert update_seconds(policy, rollout, [2], temperature=1.0, groups_per_pass=1).keys() == {2}
