"""The trust region: its arithmetic by hand, and what it does to training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.rl.trust_region import (
    FIRST_RATE,
    MOST_CHANGE,
    MOST_OVER,
    MOST_UNDER,
    TARGET,
    TrustRegion,
    divergence,
    factor_towards,
    fitted_step,
    measured_completions,
)
from tests.rl.toy_training import (
    Load,
    even_share,
    settings_of,
    short_questions_only,
    thawed,
    train,
    trained,
    trainer_of,
)


def test_divergence_of_two_tokens_worked_out_by_hand() -> None:
    before = torch.tensor([[0.5, 0.5, 0.9]]).log()
    after = torch.tensor([[0.25, 0.75, 0.1]]).log()
    # r = 1/2: −1/2 + log 2; r = 3/2: 1/2 − log 3/2; the third is padding.
    expected = -0.5 + math.log(2) + 0.5 - math.log(1.5)
    assert float(divergence(before, after, torch.tensor([[1, 1, 0]]))) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(before, before, torch.ones(1, 3))) == 0


def test_divergence_is_the_kl_of_the_distributions_on_average() -> None:
    before, after = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    each = [divergence(before[i].log(), after[i].log(), torch.ones(())) for i in range(3)]
    mean = sum(float(share * kl) for share, kl in zip(before, each, strict=True))
    assert mean == pytest.approx(float((before * (before / after).log()).sum()), rel=1e-5)


def test_kl_grows_with_the_square_of_a_step() -> None:
    assert factor_towards(1e-3, 4e-3) == 0.5
    assert factor_towards(9e-3, 1e-3) == pytest.approx(3)
    assert factor_towards(1e-3, 0) == MOST_CHANGE
    assert factor_towards(1e-3, math.inf) == 1 / MOST_CHANGE


def stepped(length: float, start: float = 1.0, curve: float = 1.0) -> tuple[Any, ...]:
    """The fit of a step of this length where KL is `curve` times the square of a step, and where it ended."""
    parameter, before = torch.tensor([start + length]), torch.tensor([start])
    kl = lambda: curve * float(parameter - before) ** 2  # noqa: E731
    return *fitted_step([parameter], [before], 1e-4, kl(), kl), float(parameter)


def test_a_step_near_the_target_stays_and_the_rate_goes_half_of_the_way() -> None:
    length, kl, change, end = stepped(0.02)
    assert (length, kl, end) == (1.0, pytest.approx(4e-4, rel=1e-3), pytest.approx(1.02))
    # Its KL is four times the target, so half of its length would do: √½ of the rate for now.
    assert change == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_the_rate_goes_half_of_the_way_after_a_step_that_is_shortened_a_little() -> None:
    factor, kl, change, end = stepped(0.04)
    assert (kl, end) == (pytest.approx(1e-4, rel=0.02), pytest.approx(1.01, rel=1e-4))
    assert (factor, change) == (pytest.approx(0.25, rel=0.02), pytest.approx(0.5, rel=0.02))


@pytest.mark.parametrize("length", [5e-4, 0.5])
def test_a_step_far_from_the_target_is_brought_there_with_the_rate(length: float) -> None:
    factor, kl, change, end = stepped(length)
    assert kl == pytest.approx(1e-4, rel=0.02)
    assert end == pytest.approx(1.01, rel=1e-4)
    assert factor == pytest.approx(0.01 / length, rel=0.02)
    assert change == pytest.approx(factor, rel=0.02)


def test_a_step_that_moved_nothing_leaves_the_rate() -> None:
    assert stepped(0.0) == (1.0, 0.0, 1.0, 1.0)


def test_a_step_into_nowhere_is_shortened_a_hundredfold_a_time() -> None:
    parameter, before = torch.tensor([100.0]), torch.tensor([0.0])
    kls = iter([math.inf, 2e-4])
    length, kl, _ = fitted_step([parameter], [before], 1e-4, math.inf, lambda: next(kls))
    assert (length, kl) == (pytest.approx(1e-4), 2e-4)
    assert float(parameter) == pytest.approx(0.01)


def test_every_step_ends_near_the_target(load: Load, tmp_path: Path) -> None:
    _, metrics = train(thawed(load, 2), tmp_path, steps=4, lr="auto", prompts_per_step=4)
    assert all(TARGET / MOST_UNDER <= line["step_kl"] <= TARGET * MOST_OVER for line in metrics)
    assert len({line["lr"] for line in metrics}) == 4


def test_the_kl_is_of_the_groups_that_teach(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2, quantize="none")
    settings = settings_of(steps=1, lr=1e-3, prompts_per_step=6)
    trainer = trainer_of(policy, tmp_path, settings, short_questions_only)
    region = TrustRegion(trainer)
    trainer.add_callback(region)
    trainer.train()
    (inputs,) = trainer._buffered_inputs or []
    rollout = inputs["rollout"]
    after, _ = trainer._scored_in_slices(rollout)
    rows = inputs["advantages"].bool()
    assert rows.sum() == 3 * 4
    mask = rollout.scored[rows]
    # The sampler's log-probs are those before the step, but for rounding.
    kl = divergence(rollout.log_probs[rows], after[rows].detach(), mask)
    expected = float(kl / (rollout.entropies[rows] * mask).sum())
    assert region.figures["step_kl"] == pytest.approx(expected, rel=1e-3)


def test_completions_that_are_measured() -> None:
    # 64 completions of 4 tokens are 256; of 16 tokens, a quarter of each group is enough.
    assert measured_completions(8, 64 * 4) == 8
    assert measured_completions(8, 64 * 16) == 2
    assert measured_completions(8, 64 * 8 + 1) == 4
    # Two of each, however long they are.
    assert measured_completions(8, 64 * 10_000) == 2
    assert measured_completions(2, 10**6) == 2
    assert measured_completions(8, 0) == 8


def test_of_long_completions_only_some_are_measured(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = thawed(load, 2, quantize="none")
    trainer = trainer_of(
        policy, tmp_path, settings_of(steps=1, lr=1e-3, prompts_per_step=6), short_questions_only
    )
    trainer.add_callback(region := TrustRegion(trainer))
    monkeypatch.setattr("midtune.rl.trust_region.ENOUGH_TOKENS", 1)
    trainer.train()
    (inputs,) = trainer._buffered_inputs or []
    rollout = inputs["rollout"]
    after, _ = trainer._scored_in_slices(rollout)
    # The first two of the four completions of each group.
    rows = inputs["advantages"].bool() & (torch.arange(24) % 4 < 2)
    assert rows.sum() == 3 * 2
    mask = rollout.scored[rows]
    kl = divergence(rollout.log_probs[rows], after[rows].detach(), mask)
    expected = float(kl / (rollout.entropies[rows] * mask).sum())
    assert region.figures["step_kl"] == pytest.approx(expected, rel=1e-3)


def test_a_step_that_teaches_nothing_leaves_the_rate(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 2)
    before = trained(policy)
    _, metrics = train(policy, tmp_path, lambda completion_ids, **_: [1.0] * len(completion_ids), lr="auto")
    assert [line["lr"] for line in metrics] == [FIRST_RATE] * 2
    assert not any("step_kl" in line for line in metrics)
    assert torch.equal(trained(policy), before)


def test_a_schedule_shortens_steps_and_not_the_rate_beneath(load: Load, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "lr": "auto", "lr_schedule": "linear", "prompts_per_step": 4}
    _, metrics = train(thawed(load, 2), tmp_path, **settings)
    for line in metrics:
        target = TARGET * ((5 - line["step"]) / 4) ** 2
        assert target / MOST_UNDER <= line["step_kl"] <= target * MOST_OVER


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "adamw_8bit"}, {"lr_schedule": "cosine", "beta": 0.1}]
)
def test_resuming_continues_to_the_last_bit(load: Load, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"steps": 6, "lr": "auto", **settings}
    straight, resumed = thawed(load, 2), thawed(load, 2)
    _, expected = train(straight, tmp_path / "straight", **settings)
    _, before = train(thawed(load, 2), tmp_path / "run", **settings, stop_after=3)
    _, after = train(resumed, tmp_path / "run", **settings, resume_from=tmp_path / "run" / "checkpoint-3")
    exact = ("step", "reward", "loss", "lr", "step_kl")
    assert [[line[name] for name in exact] for line in before + after] == [
        [line[name] for name in exact] for line in expected
    ]
    assert torch.equal(trained(resumed), trained(straight))


def test_rates_of_blocks_keep_their_ratio(load: Load, tmp_path: Path) -> None:
    policy = thawed(load, 1, 2)
    trainer = trainer_of(policy, tmp_path, settings_of(steps=3), even_share, lr_multipliers={1: 3.0})
    trainer.add_callback(TrustRegion(trainer))
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) / min(rates) == pytest.approx(3)
