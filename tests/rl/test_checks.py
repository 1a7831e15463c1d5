"""What is promised of training and checked while it trains."""

from __future__ import annotations

import pytest
import torch

from midtune.errors import MidtuneError, RunStopped
from midtune.rl.checks import check_trainable, compare_log_probs
from midtune.rollout.sampling import Sampling
from midtune.rollout.text import sample
from tests.rl.toy_training import Load, thawed


def test_a_trained_parameter_in_half_precision_is_refused(load: Load) -> None:
    policy = thawed(load, 2)
    policy.blocks[2].mlp.up_proj.bfloat16()
    with pytest.raises(MidtuneError, match=r"layers\.2\.mlp\.up_proj\.weight is trained in torch\.bfloat16"):
        check_trainable(policy)


def test_a_gradient_outside_the_trained_block_is_refused(load: Load) -> None:
    policy = thawed(load, 2)
    policy.model.model.norm.requires_grad_(True)
    with pytest.raises(MidtuneError, match=r"model\.norm\.weight requires a gradient outside blocks \[2\]"):
        check_trainable(policy)


def test_activations_that_overflow_in_fp16_end_the_run(load: Load) -> None:
    policy = thawed(load, 2)
    rollout = sample(policy, [[5, 6, 7]], Sampling(4, group_size=2), boundary_block=2)
    policy.compute_dtype = torch.float16
    with pytest.raises(RunStopped, match="overflow in fp16; add --set model.dtype=fp32"):
        compare_log_probs(policy, rollout, rollout.log_probs * torch.nan)
