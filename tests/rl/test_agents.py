"""Training on episodes of several turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.model.policy import Policy
from midtune.rl.advantages import gigpo
from midtune.rl.tail import completion_log_probs
from midtune.rl.trainer import Agent, LayerGRPOTrainer
from midtune.rollout.episodes import play
from midtune.rollout.sampler import Sampling
from tests.plain import plain_log_probs
from tests.rl.test_trainer import question_rows, settings_of, thawed, trainer_of
from tests.rollout.counting import Counting

Load = Callable[..., Policy]


def zero(completions: list[Any], **_: Any) -> list[float]:
    raise AssertionError("an environment gives its rewards itself")


class Long(Counting):
    """Every episode may take five turns."""

    def reset(self, turns: int = 5, **row: object) -> str | None:
        return super().reset(turns)


class Keeping(LayerGRPOTrainer):
    """Keeps what the last update minimised."""

    def _take_gradient(self, model: Any, inputs: dict[str, Any], groups: int) -> torch.Tensor:
        self.inputs, self.played = inputs, self._episodes
        return super()._take_gradient(model, inputs, groups)

    def _scored_for_update(self) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropies = super()._scored_for_update()
        log_probs.retain_grad()
        self.scored = log_probs
        return log_probs, entropies


def one_step(load: Load, folder: Path, **agent: Any) -> Keeping:
    torch.manual_seed(0)
    trainer = trainer_of(
        Keeping,
        thawed(load, 2, quantize="none"),
        folder,
        settings_of(steps=1),
        zero,
        agent=Agent(Long, max_turns=3, max_new_tokens=4, **agent),
        optim="sgd",
        max_grad_norm=0.0,
    )
    trainer.train()
    assert isinstance(trainer, Keeping)
    return trainer


def test_the_tail_of_an_episode_equals_the_whole_model(load: Load) -> None:
    policy = thawed(load, 2, quantize="none")
    torch.manual_seed(0)
    rows = question_rows()[:3]
    rollout = play(
        policy, rows, Long, Sampling(max_new_tokens=4), max_turns=3, group_size=2, boundary_block=2
    ).rollout
    mask = rollout.sampled_mask
    weights = torch.randn(mask.shape) * mask
    ours, theirs = (
        completion_log_probs(policy, rollout, temperature=1.0)[0],
        plain_log_probs(policy, rollout, 1.0)[0],
    )
    torch.testing.assert_close(ours * mask, theirs * mask, atol=1e-4, rtol=1e-4)
    parameters = list(policy.trained_parameters().values())
    found, expected = (
        torch.cat([part.flatten() for part in torch.autograd.grad((scores * weights).sum(), parameters)])
        for scores in (ours, theirs)
    )
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("by_step", [False, True])
def test_a_step_is_that_of_the_whole_model_without_observations(
    load: Load, tmp_path: Path, by_step: bool
) -> None:
    trainer = one_step(load, tmp_path, by_step=by_step)
    played, inputs = trainer.played, trainer.inputs
    assert played is not None
    mask = played.rollout.sampled_mask
    assert torch.equal(inputs["tool_mask"] * inputs["completion_mask"], mask)
    returns = torch.tensor(played.returns()).view(2, 4)
    assert bool((returns.std(1) > 0).all())
    assert trainer.state.log_history[0]["reward"] == pytest.approx(float(returns.mean()))
    if by_step:
        groups = [slice(0, 4), slice(4, 8)]
        steps = [
            own
            for group in groups
            for own in gigpo(played.states[group], played.rewards[group], gamma=0.95, omega=1)
        ]
        advantages = played.per_token(steps)
    else:
        scaled = (returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-4)
        advantages = scaled.view(-1, 1) * mask
    # GRPO: each token's advantage over the tokens that were sampled of its episode, and over episodes.
    slope = -advantages / mask.sum(1, keepdim=True) / len(mask)
    assert trainer.scored.grad is not None
    torch.testing.assert_close(trainer.scored.grad, slope, atol=1e-6, rtol=1e-3)
    assert not trainer.scored.grad[mask == 0].any()

    policy = thawed(load, 2, quantize="none")
    whole = plain_log_probs(policy, played.rollout, 1.0)[0]
    torch.testing.assert_close(trainer.scored.detach() * mask, whole.detach() * mask, atol=1e-4, rtol=1e-4)
    parameters = list(policy.trained_parameters().values())
    expected = torch.cat([part.flatten() for part in torch.autograd.grad((whole * slope).sum(), parameters)])
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
