"""bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16; see `forbid_cpu_packing`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from midtune.model.loading import load_policy
from midtune.model.sources import resolve


def test_gradients_pass_4bit_layers_after_sampling(
    random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on such a CPU; on any other the repacked weights could not even be used.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    policy = load_policy(resolve(str(random_checkpoint("qwen3"))), device="cpu")
    packed = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = policy.model(ids).logits
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, packed[name]), name

    embedded = policy.model.get_input_embeddings()(ids).requires_grad_()
    logits = policy.model(inputs_embeds=embedded).logits
    assert torch.allclose(logits, before, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits.sum(), embedded)
    assert gradient.abs().min() > 0
