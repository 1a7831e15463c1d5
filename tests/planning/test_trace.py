"""Memory that is worked out, against what the same code holds when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from midtune.bench.flops import Batch
from midtune.config import TrainingConfig
from midtune.model.blocks import config_from
from midtune.model.configs import config_of
from midtune.model.loading import load_policy
from midtune.model.sources import resolve
from midtune.planning import trace
from midtune.planning.budget import Held, Loaded
from midtune.planning.skeleton import planned_tail
from midtune.planning.trace import block_update, sampling, whole_update
from midtune.planning.tracker import Tracker
from midtune.rl.tail import completion_log_probs, tail_settings
from midtune.rollout.sampling import Rollout, Sampling
from midtune.rollout.text import sample
from tests.architectures import EVERY

BATCH = Batch(prompts=2, group_size=3, prompt_tokens=20, new_tokens=12)


@pytest.mark.parametrize(
    ("architecture", "quantize", "recompute_tokens"),
    [
        *(("qwen3", quantize, recompute) for quantize in ("none", "nf4") for recompute in (0, 64)),
        # Experts, and each slower tail.
        ("qwen3_moe", "none", 0),
        ("qwen3_5_text", "nf4", 0),
        ("gemma4_text", "none", 64),
    ],
)
def test_the_update_without_data_holds_what_it_holds_with(
    random_checkpoint: Callable[..., Path], architecture: str, quantize: str, recompute_tokens: int
) -> None:
    folder = random_checkpoint(architecture, **EVERY[architecture])
    policy = load_policy(resolve(str(folder)), quantize=quantize)
    config = policy.model.config
    policy.thaw(1)
    torch.manual_seed(0)
    prompts = [[5] * BATCH.prompt_tokens] * BATCH.prompts
    policy.model.generation_config.eos_token_id = None
    rollout = sample(
        policy,
        prompts,
        Sampling(BATCH.new_tokens, group_size=BATCH.group_size),
        boundary_block=1,
    )
    rollout = _unfinished(rollout)

    def update() -> int:
        there = [*policy.model.parameters(), *policy.model.buffers()]
        gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
        with Tracker([*there, *gradients]) as tracker:
            log_probs, _ = completion_log_probs(
                policy, rollout, temperature=1.0, recompute_tokens=recompute_tokens
            )
            log_probs.mean().backward()
        return tracker.held().peak

    update()
    real = update()
    model = Loaded(config, torch.float32, quantize == "nf4", on_card=False)
    kind = planned_tail(config, 1)
    assert kind == policy.tails[1]
    planned = block_update(
        model, BATCH, tail_blocks=3, trained=1, kind=kind, recompute_tokens=recompute_tokens
    )
    assert planned.peak == pytest.approx(real, rel=0.1)


def _unfinished(rollout: Rollout) -> Rollout:
    """The same with completions that all have their full length."""
    rollout.completion_mask = torch.ones_like(rollout.completion_ids)
    return rollout


@pytest.mark.parametrize(("recompute_tokens", "error"), [(0, 0), (64, 0.02)])
def test_a_deep_update_is_worked_out_from_three_blocks(
    monkeypatch: pytest.MonkeyPatch, recompute_tokens: int, error: float
) -> None:
    model = Loaded(config_of("smollm2-135m"), torch.float32, True, on_card=False)

    def found() -> Held:
        return block_update(model, BATCH, tail_blocks=7, trained=1, recompute_tokens=recompute_tokens)

    few = found()
    monkeypatch.setattr(trace, "FEW_BLOCKS", 7)
    assert few.peak == pytest.approx(found().peak, rel=error)


def test_more_logits_at_a_time_are_planned_for_on_a_card() -> None:
    model = Loaded(config_of("smollm2-135m"), torch.bfloat16, True, on_card=True)
    cpu, card = (
        block_update(
            model,
            Batch(8, 8, 20, 200),
            tail_blocks=3,
            trained=1,
            **tail_settings(TrainingConfig(), on_card=on_card),
        )
        for on_card in (False, True)
    )
    # Logits and their log-softmax, at least, in fp32.
    assert card.peak - cpu.peak >= 2 * 4 * (2**26 - 2**24)


@pytest.mark.parametrize("arm", ["trl-full", "trl-block", "trl-qlora"])
def test_a_deep_model_is_worked_out_from_three_blocks(monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    config = config_from(config_of("smollm2-135m"), 23, 30)
    model = Loaded(config, torch.bfloat16, arm != "trl-full", on_card=True)

    def held() -> tuple[Held, Held]:
        trace.sampling.cache_clear()
        return (
            whole_update(model, BATCH, arm, block=1),
            sampling(model, BATCH, shared=arm == "trl-block"),
        )

    few = held()
    monkeypatch.setattr(trace, "FEW_BLOCKS", 7)
    every = held()
    assert [part.peak for part in few] == [part.peak for part in every]
    assert [part.kept for part in few] == [part.kept for part in every]


def test_checkpointing_holds_less_and_adapters_less_than_all() -> None:
    model = Loaded(config_of("smollm2-135m"), torch.bfloat16, True, on_card=True)
    plain = Loaded(model.config, model.dtype, False, on_card=True)
    full = whole_update(plain, BATCH, "trl-full")
    kept = whole_update(plain, BATCH, "trl-full-kept")
    assert full.kept < kept.kept / 3
    qlora = whole_update(model, BATCH, "trl-qlora")
    assert qlora.peak < full.peak
    one = whole_update(model, BATCH, "trl-block", block=15)
    lower = whole_update(model, BATCH, "trl-block", block=5)
    assert one.kept < lower.kept


def test_keys_and_values_by_hand() -> None:
    model = Loaded(config_of("smollm2-135m"), torch.bfloat16, True, on_card=True)
    held = sampling(model, BATCH, shared=False)
    # 6 rows, 20 + 12 - 2 tokens, 30 blocks, 3 heads of 64, keys and values, 2 bytes.
    cache = 6 * 30 * 30 * 3 * 64 * 2 * 2
    assert cache <= held.kept <= cache * 1.05
    assert held.peak > held.kept
