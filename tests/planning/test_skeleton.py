"""Models without data, against the code that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

from midtune.bench.flops import Batch
from midtune.model.configs import config_of
from midtune.planning import skeleton
from midtune.planning.budget import Held, Loaded
from midtune.planning.skeleton import chunked_log_probs
from midtune.planning.trace import block_update
from midtune.planning.tracker import Tracker


def held(
    score: Callable[[nn.Module, torch.Tensor], torch.Tensor], dtype: torch.dtype, tokens: int, trained: bool
) -> Held:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        head = nn.Linear(64, 70_000, bias=False, dtype=dtype)
        states = torch.empty(tokens, 64, dtype=dtype, requires_grad=True)
        head.weight.requires_grad_(trained)
        with Tracker([head.weight, states]) as tracker:
            log_probs = score(head, states)
            tracker.keep()
            log_probs.mean().backward()
    return tracker.held()


def of_trl(head: Any, states: torch.Tensor) -> torch.Tensor:
    targets = torch.zeros(len(states), dtype=torch.long)
    found: torch.Tensor = ChunkedLogProbFunction.apply(
        states, head.weight, None, targets, 1.0, skeleton.HEAD_WORDS, None, 1.0, ("entropy",)
    )[0]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [300, 5000])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("on_card", [False, True])
def test_the_head_holds_what_that_of_trl_does(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, trained: bool, on_card: bool
) -> None:
    if on_card:
        # Kernels work inside a tile.
        for name in ("_forward_tile", "_backward_tile"):
            monkeypatch.setattr(chunked_logprob, name, lambda *_, **__: None)
    ours = held(lambda head, states: chunked_log_probs(head, states, on_card=on_card), dtype, tokens, trained)
    assert ours == held(of_trl, dtype, tokens, trained)


def test_the_head_works_in_chunks_as_large_as_those_of_trl() -> None:
    assert skeleton.HEAD_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert skeleton.HEAD_WORDS == utils._CHUNKED_LOGPROB_CHUNK_SIZE


def test_masks_without_data_make_almost_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def update() -> Held:
        model = Loaded(config_of("smollm2-135m"), torch.float32, quantized=True, on_card=False)
        return block_update(model, Batch(1, 4, 60, 100), tail_blocks=4, trained=1)

    written = update()
    monkeypatch.setattr(skeleton, "LARGE_MASK", 0)
    assert update().peak == pytest.approx(written.peak, rel=0.02)
