"""Gradients in bf16, beside those that PyTorch adds up in fp32."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from midtune.rl.gradients import Bf16Gradients
from tests.rl.toy_training import (
    Load,
    settings_of,
    short_backward,
    thawed,
    train,
    trained,
    trainer_of,
)


def test_they_are_added_up_in_eight_bits_of_precision() -> None:
    weight = nn.Parameter(torch.ones(2))
    with Bf16Gradients([weight]) as gradients:
        # Between 1 and 2, bf16 has steps of 2^-7.
        (weight * torch.tensor([1.0, 1 + 2**-9])).sum().backward()
        assert weight.grad is None
        (weight * torch.tensor([2**-7, 2**-9])).sum().backward()
        gradients.put_back()
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        assert weight.grad.tolist() == [1 + 2**-7, 1.0]
        weight.grad = None
        weight.sum().backward()
        gradients.clear()
        gradients.put_back()
        assert weight.grad is None
    weight.sum().backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def learned(
    load: Load,
    folder: Path,
    parts: int,
    *,
    bf16: bool,
    rows: int | None = None,
    failing: int = 0,
    **more: Any,
) -> torch.Tensor:
    policy = thawed(load, 2)
    start = trained(policy)
    settings = settings_of(steps=2, prompts_per_step=4, micro_batch_tokens=400 // parts, **more)
    parameters = policy.trained_parameters().values()
    with Bf16Gradients(parameters) if bf16 else nullcontext() as gradients:
        trainer = trainer_of(
            policy,
            folder,
            settings,
            trl={"optim": "sgd", "learning_rate": 1.0},
            bf16_gradients=gradients,
            update_rows=rows,
        )
        assert trainer.args.gradient_accumulation_steps == parts
        with short_backward(policy, failing):
            trainer.train()
        assert trainer.update_rows.rows == (4 if failing else rows)
    return trained(policy) - start


def test_what_is_learned_is_almost_the_same(load: Load, tmp_path: Path) -> None:
    exact, rounded = (learned(load, tmp_path, 4, bf16=bf16, beta=0.1) for bf16 in (False, True))
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.01


def test_an_update_that_ran_out_of_memory_begins_anew(load: Load, tmp_path: Path) -> None:
    expected = learned(load, tmp_path, 2, bf16=True, rows=4)
    # What the first micro-batch of the first step has added is there, and a part of the second one's.
    found = learned(load, tmp_path, 2, bf16=True, failing=2)
    torch.testing.assert_close(found, expected)


def test_a_run_can_be_asked_for_them(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    before = trained(policy)
    step, metrics = train(policy, tmp_path, gradients="bf16")
    assert step == 2 and all(line["grad_norm"] > 0 for line in metrics)
    assert not torch.equal(trained(policy), before)
    assert not any(
        parameter._post_accumulate_grad_hooks for parameter in policy.trained_parameters().values()
    )
