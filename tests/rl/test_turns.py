"""Training on tasks that are played in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.rl.advantages import gigpo, group_relative
from midtune.rl.algorithms import own_advantages
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rl.training import in_order, sampling_of
from midtune.rl.turns import turns_of
from midtune.rollout.episodes import Episode, EpisodeSampler, Turn
from midtune.rollout.sampling import Rollout, SamplingLimits
from tests.plain import plain_log_probs
from tests.rl.toy_training import (
    Load,
    Metrics,
    arguments_of,
    changed,
    contents,
    settings_of,
    thawed,
    train,
    trained,
)
from tests.rollout.corridor import OWN, PLAYED, Corridor, episode_sampler, game


def play(policy: Policy, folder: Path, reward: Any = OWN, **changes: Any) -> Metrics:
    _, metrics = train(episode_sampler(policy), folder, reward, PLAYED, **{"max_new_tokens": 60, **changes})
    return metrics


@pytest.mark.parametrize("algorithm", ["grpo", "gigpo", "rloo"])
def test_only_the_trained_block_learns(load: Load, tmp_path: Path, algorithm: str) -> None:
    policy = thawed(load, 2)
    before = contents(policy)
    metrics = play(policy, tmp_path, algorithm=algorithm)
    assert changed(policy, before) == {name for name in before if name.startswith("model.layers.2.")}
    for line in metrics:
        assert 1 <= line["turns"] <= 4
        assert line["shown_length"] > 0
        assert line["completion_length"] <= 4 * line["turns"]
        assert line["grad_norm"] > 0


class Keeping(EpisodeSampler):
    """Keeps its rollouts."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, SamplingLimits(), game())
        self.kept: list[Rollout] = []

    def sample(self, *arguments: Any, **settings: Any) -> Rollout:
        self.kept.append(super().sample(*arguments, **settings))
        return self.kept[-1]


@pytest.mark.parametrize("algorithm", ["grpo", "gigpo"])
def test_an_update_is_that_of_the_plain_model(load: Load, tmp_path: Path, algorithm: str) -> None:
    """The gradient of −Σ weight · log-prob over the tokens that were drawn, weights worked out by the formulas."""
    ours, plain = (thawed(load, 2, quantize="none") for _ in range(2))
    start, lr = trained(ours), 0.1
    sampler = Keeping(ours)
    rewards: list[float] = []

    def listening(**columns: Any) -> list[float]:
        rewards[:] = OWN(**columns)
        return rewards

    settings = settings_of(
        steps=1,
        lr=lr,
        max_grad_norm=1e9,
        max_new_tokens=60,
        algorithm=algorithm,
        gigpo_omega=0.5,
        gigpo_gamma=0.9,
    )
    args, _ = arguments_of(settings, tmp_path, optim="sgd")
    rows = in_order(PLAYED, 2, seed=0)
    meter, advantages = Meter(ours.device), own_advantages(settings)
    LayerGRPOTrainer(
        sampler, sampling_of(settings), args, [listening], rows, meter=meter, advantages=advantages
    ).train()
    (rollout,) = sampler.kept
    episodes, scores = rollout.episodes, np.array(rewards).reshape(-1, 4)
    weights = torch.zeros(rollout.completion_ids.shape)
    if algorithm == "gigpo":
        played = [turns_of(episode, reward) for episode, reward in zip(episodes, scores.flat, strict=True)]
        advantages = gigpo(scores, played, omega=0.5, gamma=0.9)
        assert any(len(set(turns.tolist())) > 1 for turns in advantages)
    else:
        advantages = [
            np.full(len(episode.turns), value)
            for episode, value in zip(episodes, group_relative(scores).flat, strict=True)
        ]
    drawn = [sum(turn.stop - turn.start for turn in episode.turns) for episode in episodes]
    for row, (episode, values) in enumerate(zip(episodes, advantages, strict=True)):
        divisor = sum(drawn) if algorithm == "gigpo" else len(episodes) * drawn[row]
        for turn, value in zip(episode.turns, values, strict=True):
            weights[row, turn.start : turn.stop] = value / divisor
    log_probs, _ = plain_log_probs(plain, rollout, 1.0)
    (-(log_probs * weights).sum()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in plain.trained_parameters().values()])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close((start - trained(ours)) / lr, expected, atol=1e-5, rtol=1e-3)


def test_kl_counts_drawn_tokens_only(load: Load, tmp_path: Path) -> None:
    metrics = play(thawed(load, 2), tmp_path, beta=0.1)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[1]["kl"] > 1e-9


@pytest.mark.parametrize("algorithm", ["gigpo", "bnpo"])
def test_slices_of_an_update_add_up(load: Load, tmp_path: Path, algorithm: str) -> None:
    moved = []
    for rows in (4, None):
        policy = thawed(load, 2, quantize="none")
        start = trained(policy)
        play(policy, tmp_path, algorithm=algorithm, steps=1, update_rows=rows)
        moved.append(trained(policy) - start)
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 1e-2


def test_a_reward_of_the_file_sees_the_environments(load: Load, tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(environments: list[Corridor], width: list[int], **_: Any) -> list[float]:
        seen.extend(width)
        assert [environment.width - 2 for environment in environments] == width
        return [float(environment.place) for environment in environments]

    metrics = play(thawed(load, 2), tmp_path, reward, steps=1)
    assert len(seen) == 8
    assert metrics[0]["reward"] > 0


def test_what_a_reward_has_beyond_its_turns_came_with_the_last_one() -> None:
    episode = Episode([1], turns=[Turn(0, 1, "a", 0.25), Turn(2, 3, "b", 0.0)])
    assert turns_of(episode, 1.0).rewards == [0.25, 0.75]
    assert turns_of(episode, float("nan")).rewards == [0.25, 0.0]
    assert turns_of(episode, 1.0).states == ["a", "b"]


def test_a_resumed_run_equals_one_that_was_never_stopped(load: Load, tmp_path: Path) -> None:
    def run(folder: str, **arguments: Any) -> Policy:
        policy = thawed(load, 2)
        play(policy, tmp_path / folder, steps=3, algorithm="gigpo", **arguments)
        return policy

    straight = run("straight")
    run("run", stop_after=1)
    assert torch.equal(trained(run("run", resume_from=tmp_path / "run" / "checkpoint-1")), trained(straight))
