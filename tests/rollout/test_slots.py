"""Arithmetic of slots where fp16 has no room."""

from __future__ import annotations

import torch

from midtune.rollout.slots import HIDDEN, _attention


def test_scores_may_be_beyond_fp16() -> None:
    torch.manual_seed(0)
    # Products of a query and a key come to 1e5 before they are scaled.
    query, key, value = (size * torch.randn(2, 1, 3, 64) for size in (100.0, 100.0, 1.0))
    mask = torch.zeros(2, 1, 3, 3)
    mask[0, 0, :, 2] = 1
    found = [
        _attention(
            query.to(dtype), key.to(dtype), value.to(dtype), (mask * HIDDEN[dtype]).to(dtype), 64**-0.5 / 100
        )
        for dtype in (torch.float16, torch.float32)
    ]
    assert (query @ key.mT).abs().max() > torch.finfo(torch.float16).max
    for half, single in zip(*found, strict=True):
        torch.testing.assert_close(half.float(), single, atol=0.05, rtol=5e-3)
