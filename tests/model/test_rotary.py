"""Rotary embeddings by products: the same logits from fewer operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache

from midtune.bench.profile import Operators
from midtune.model.policy import Policy
from midtune.model.rotary import NAME, rotations

Load = Callable[..., Policy]
PROMPTS = torch.arange(3, 23).view(2, 10)
POSITIONS = torch.tensor([[10], [13]])


def decoded(policy: Policy) -> torch.Tensor:
    """Logits of a token fed after each prompt."""
    cache = DynamicCache()
    policy.model(PROMPTS, past_key_values=cache)
    found: torch.Tensor = policy.model(
        torch.tensor([[30], [40]]), position_ids=POSITIONS, past_key_values=cache
    ).logits
    return found


# Half of each head rotated, a part of each head, neighbouring pairs, two kinds of blocks, and sines of half the width.
@pytest.mark.parametrize(
    "architecture", ["qwen3", "phi3", "gpt_neox", "glm", "cohere", "gemma3_text", "gpt_oss", "smollm3"]
)
@torch.no_grad()
def test_logits_are_the_same(load: Load, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    policy = load(architecture, "none")
    wanted = decoded(policy)
    assert rotations(policy.model)
    for module, usual, products in rotations(policy.model):
        assert getattr(module, NAME) is usual
        monkeypatch.setattr(module, NAME, products)
    torch.testing.assert_close(decoded(policy), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_operators_do_what_ten_did(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load("qwen3", "none")
    before = Operators(policy.blocks[2]).per_pass(lambda: decoded(policy))
    for module, _, products in rotations(policy.model):
        monkeypatch.setattr(module, NAME, products)
    after = Operators(policy.blocks[2]).per_pass(lambda: decoded(policy))
    assert before - after == 8
