"""States that enter a block: captured while sampling, or recomputed; and where they are kept."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from midtune.model.policy import Policy
from midtune.rollout.boundary import storage_device, with_boundary
from midtune.rollout.sampling import SamplingLimits
from midtune.rollout.text import TextSampler
from tests.conftest import ARCHITECTURES
from tests.plain import sampled, stop_early
from tests.tight import memory_for

Load = Callable[..., Policy]


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_boundary_states_equal_recomputed_ones(load: Load, architecture: str, block: int) -> None:
    policy = load(architecture)
    stop_early(policy)
    rollout = sampled(policy, boundary_block=block)
    states = rollout.boundary
    assert states is not None
    again = with_boundary(TextSampler(policy, SamplingLimits()), rollout, block).boundary
    tokens = rollout.prompt_mask.bool()
    torch.testing.assert_close(states.prompt[tokens], again.prompt[tokens], atol=1e-5, rtol=1e-5)
    fed = rollout.completion_mask[:, 1:].bool()
    torch.testing.assert_close(
        states.completion[:, :-1][fed], again.completion[:, :-1][fed], atol=5e-5, rtol=1e-5
    )


def test_states_that_would_crowd_a_card_are_kept_on_the_host(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load("qwen3", "none")
    on_gpu = SimpleNamespace(model=policy.model, compute_dtype=torch.bfloat16, device=torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 1000 * 64 * 2, 10**9))
    # 64 values of 2 bytes a token, and a quarter of what is free.
    assert storage_device(on_gpu, 1000) == on_gpu.device  # type: ignore[arg-type]
    assert storage_device(on_gpu, 1001) == torch.device("cpu")  # type: ignore[arg-type]


def test_states_of_completions_sampled_elsewhere_need_not_fit_together(load: Load) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    rollout = sampled(policy)
    expected = with_boundary(TextSampler(policy, SamplingLimits()), rollout, 3).boundary
    with memory_for(policy, 6) as refused:
        found = with_boundary(TextSampler(policy, SamplingLimits()), rollout, 3).boundary
    assert refused == [12]
    torch.testing.assert_close(found.prompt, expected.prompt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.completion, expected.completion, atol=1e-5, rtol=1e-5)
