"""4-bit codes that are chosen by a layer's inputs: against a slow reference, and over whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F

from midtune.model.policy import Policy
from midtune.model.quantize import dequantized, linears_in_4_bit, set_codes
from midtune.model.rounding import DAMPING, calibrate, rounded

VALUES = torch.tensor([-1.0, 0.0, 1.0])


def reference(
    weight: torch.Tensor, moments: torch.Tensor, scales: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """A column at a time, with the inverse of what is left computed again for each."""
    rest, moments = weight.double().clone(), moments.double()
    moments = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    codes = torch.empty_like(weight, dtype=torch.long)
    left = moments.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        column = left[0]
        inverse = torch.linalg.inv(moments[left][:, left])
        distances = (rest[:, column, None] - values.double() * scales[:, column, None].double()).abs()
        codes[:, column] = distances.argmin(1)
        error = rest[:, column] - values[codes[:, column]] * scales[:, column]
        rest[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return codes


def test_by_hand() -> None:
    # 0.4 is rounded to 0; the second column, with half the moment in common, makes up for it: 0.4 + 0.4 · 0.5 = 0.6.
    moments = torch.tensor([[1.001, 0.5], [0.5, 1.0]]) - DAMPING * torch.eye(2)
    weight, scales = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2)
    assert rounded(weight, moments, scales, VALUES).tolist() == [[1, 2]]
    assert rounded(weight, torch.eye(2), scales, VALUES).tolist() == [[1, 1]]


def test_as_the_reference() -> None:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 200, generator=source) @ torch.randn(200, 200, generator=source)
    weight = torch.randn(5, 200, generator=source)
    scales = 1 + torch.rand(5, 200, generator=source)
    values = bnb.functional.get_4bit_type("nf4", device="cpu").float()
    assert torch.equal(values, values.sort().values)
    found = rounded(weight, inputs.T @ inputs, scales, values)
    assert (found == reference(weight, inputs.T @ inputs, scales, values)).float().mean() > 0.99


def test_other_codes_under_the_same_scales() -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 128, generator=source)
    layer = bnb.nn.Linear4bit(128, 8, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": weight})
    layer.to("cpu")
    codes, nearest = layer.weight.data.clone(), dequantized(layer.weight)
    set_codes(layer.weight, partial(rounded, weight, torch.eye(128)))
    # bitsandbytes chooses codes before it rounds the scales.
    assert (layer.weight.data == codes).float().mean() > 0.9
    assert (dequantized(layer.weight) - weight).square().mean() <= (nearest - weight).square().mean()

    inputs = torch.randn(300, 128, generator=source) @ torch.randn(128, 128, generator=source)
    set_codes(layer.weight, partial(rounded, weight, inputs.T @ inputs))

    def error(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    assert error(dequantized(layer.weight)) < 0.7 * error(nearest)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma3_text"])
def test_a_model_comes_closer_to_its_unquantized_self(load: Callable[..., Policy], architecture: str) -> None:
    source = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 200, (length,), generator=source).tolist() for length in (40, 25, 31, 50)]

    def logits(policy: Policy) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([policy.model(torch.tensor([text])).logits[0] for text in texts])

    whole, policy, again = (load(architecture, quantize) for quantize in ("none", "nf4", "nf4"))
    nearest = F.mse_loss(logits(policy), logits(whole))
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    calibrate(policy, texts)
    assert F.mse_loss(logits(policy), logits(whole)) < 0.8 * nearest
    after = policy.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"{name}.weight" for name in linears_in_4_bit(policy.model)}
    calibrate(again, texts)
    assert torch.equal(logits(policy), logits(again))
    # Nothing is left behind: the next forward pass rounds nothing.
    assert not any(block._forward_pre_hooks for block in policy.blocks)
