"""Weights held for decoding: the same products, and nothing left behind; and no packing for bf16 on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from midtune.model import quantize
from midtune.model.policy import Policy
from midtune.model.quantize import unpacked
from tests.architectures import RECURRENT

Load = Callable[..., Policy]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = policy.model(IDS).logits
    return found


def replaced(policy: Policy) -> list[str]:
    return [name for name, part in policy.model.named_modules() if "forward" in vars(part)]


def is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("quantize_as", ["nf4", "none"])
@pytest.mark.parametrize(
    "architecture", ["qwen2", "gemma3_text", "phi3"]
)  # with biases, with a capped head, fused
def test_logits_are_the_same(
    load: Load, monkeypatch: pytest.MonkeyPatch, architecture: str, quantize_as: str, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(quantize, "_has_fast_layout", lambda device, dtype: False)
    policy = load(architecture, quantize_as)
    policy.thaw(2)
    expected = logits(policy)
    with unpacked(policy.model, torch.float32, rows=2, most_bytes=2**30):
        assert bool(replaced(policy)) == (fast or quantize_as == "nf4")
        torch.testing.assert_close(logits(policy), expected, atol=1e-5, rtol=1e-5)
    assert replaced(policy) == []
    assert torch.equal(logits(policy), expected)


def test_lora_is_part_of_the_product(load: Load) -> None:
    policy = load("qwen3")
    policy.add_lora([2], rank=4)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.1
    expected = logits(policy)
    with unpacked(policy.model, torch.float32, rows=2, most_bytes=2**30):
        torch.testing.assert_close(logits(policy), expected, atol=1e-5, rtol=1e-5)


def test_a_trained_weight_is_read_anew_each_time(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    for _ in range(2):
        with unpacked(policy.model, torch.float32, rows=2, most_bytes=2**30):
            found = logits(policy)
        torch.testing.assert_close(found, logits(policy), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            for parameter in policy.trained_parameters().values():
                parameter += 0.05


def test_layers_beyond_the_budget_work_as_they_are(load: Load) -> None:
    policy = load("qwen3")
    expected = logits(policy)
    first = next(part for part in policy.model.modules() if is_linear(part))
    with unpacked(policy.model, torch.float32, rows=2, most_bytes=4 * first.in_features * first.out_features):
        assert len(replaced(policy)) == 1
        torch.testing.assert_close(logits(policy), expected, atol=1e-5, rtol=1e-5)
    with unpacked(policy.model, torch.float32, rows=2, most_bytes=0):
        assert replaced(policy) == []


def test_weights_are_packed_again_after_a_failure(load: Load) -> None:
    policy = load("qwen3")
    with pytest.raises(RuntimeError, match="out of memory"):
        with unpacked(policy.model, torch.float32, rows=2, most_bytes=2**30):
            raise RuntimeError("out of memory")
    assert replaced(policy) == []


def test_gradients_pass_4bit_layers_after_sampling(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on such a CPU; on any other the repacked weights could not even be used.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    policy = load("qwen3")
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


def test_weights_that_are_read_directly_stay_as_they_are(load: Load) -> None:
    mixer = load("mamba", "nf4", **RECURRENT["mamba"]).blocks[0].get_submodule("mixer")
    assert type(mixer.dt_proj) is nn.Linear
    assert isinstance(mixer.in_proj, bnb.nn.Linear4bit)


def test_weights_stored_transposed_are_thawed_as_stored(load: Load) -> None:
    policy, plain = load("gpt2", "nf4"), load("gpt2", "none")
    assert isinstance(policy.blocks[1].get_submodule("attn.c_attn"), bnb.nn.Linear4bit)
    policy.thaw(1)
    for name, parameter in plain.blocks[1].named_parameters():
        assert torch.equal(policy.blocks[1].get_parameter(name), parameter)
