"""Parts of a rollout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from midtune.model.policy import Policy
from tests.plain import sampled, stop_early


def test_groups_are_cut_out_whole(load: Callable[..., Policy]) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    rollout = sampled(policy, boundary_block=2)
    part = rollout.groups(slice(1, 3))
    assert torch.equal(part.prompt_ids, rollout.prompt_ids[1:3])
    assert part.completions() == rollout.completions()[3:9]
    assert torch.equal(part.log_probs, rollout.log_probs[3:9])
    assert part.boundary is not None and rollout.boundary is not None
    assert torch.equal(part.boundary.prompt, rollout.boundary.prompt[1:3])
    assert torch.equal(part.boundary.completion, rollout.boundary.completion[3:9])
