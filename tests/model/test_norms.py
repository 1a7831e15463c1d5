"""RMS norms by one kernel: the same values, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from midtune.model.norms import fused_norms
from midtune.model.policy import Policy

Load = Callable[..., Policy]
IDS = torch.arange(3, 23).view(2, 10)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text", "phi3", "smollm3", "olmo2"])
@torch.no_grad()
def test_logits_are_the_same(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    for name, parameter in policy.model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    norms = [part for part in policy.model.modules() if type(part).__name__.endswith("RMSNorm")]
    wanted = policy.model(IDS).logits
    with fused_norms(policy.model, torch.float32):
        assert all("forward" in vars(norm) for norm in norms)
        torch.testing.assert_close(policy.model(IDS).logits, wanted, atol=1e-4, rtol=1e-5)
    assert not any("forward" in vars(norm) for norm in norms)


@torch.no_grad()
def test_a_norm_of_another_kind_stays_as_it_is(load: Load) -> None:
    policy = load("qwen3", "none")
    norm = policy.model.model.norm
    norm.weight.copy_(torch.linspace(0.5, 1.5, 64))
    usual = type(norm).forward

    def doubled(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = 2 * usual(self, hidden_states)
        return found

    norm.__class__ = type("DoubledRMSNorm", (type(norm),), {"forward": doubled})
    wanted = policy.model(IDS).logits
    with fused_norms(policy.model, torch.float32):
        assert "forward" not in vars(norm)
        torch.testing.assert_close(policy.model(IDS).logits, wanted, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_squares_do_not_overflow_fp16(load: Load) -> None:
    policy = load("llama", "none")
    norm = policy.model.model.norm
    hidden = torch.linspace(-6e4, 6e4, 64)[None]
    wanted = norm(hidden)
    with fused_norms(policy.model, torch.float16):
        assert "forward" in vars(norm)
        torch.testing.assert_close(norm(hidden.half()).float(), wanted, atol=2e-3, rtol=2e-3)
