"""Training on tasks that are played in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.rl.advantages import gigpo, group_relative
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rl.training import train_blocks
from midtune.rl.turns import turns_of
from midtune.rollout.episodes import Episode, Turn
from midtune.tasks.environment import Game, reward_of
from tests.plain import plain_log_probs
from tests.rl.test_trainer import changed, contents, settings_of, thawed, trained
from tests.rollout.corridor import ROWS, Corridor

Load = Callable[..., Policy]
OWN = reward_of(Corridor, "the corridor", [])


def game() -> Game:
    return Game("the corridor", Corridor, max_turns=4, turn_tokens=4)


def train(
    policy: Policy, folder: Path, reward: Any = OWN, update_rows: int | None = None, **changes: Any
) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = []
    rows = [{**row, "question": str(row["width"])} for row in ROWS]
    train_blocks(
        policy,
        rows,
        reward,
        settings_of(**{"max_new_tokens": 60, **changes}),
        update_rows=update_rows,
        folder=folder,
        seed=0,
        meter=Meter(policy.device),
        on_step=metrics.append,
        game=game(),
    )
    return metrics


@pytest.mark.parametrize("algorithm", ["grpo", "gigpo", "rloo"])
def test_only_the_trained_block_learns(load: Load, tmp_path: Path, algorithm: str) -> None:
    policy = thawed(load, 2)
    before = contents(policy)
    metrics = train(policy, tmp_path, algorithm=algorithm)
    assert changed(policy, before) == {name for name in before if name.startswith("model.layers.2.")}
    for line in metrics:
        assert 1 <= line["turns"] <= 4
        assert line["shown_length"] > 0
        assert line["completion_length"] <= 4 * line["turns"]
        assert line["grad_norm"] > 0


@pytest.mark.parametrize("algorithm", ["grpo", "gigpo"])
def test_an_update_is_that_of_the_plain_model(load: Load, tmp_path: Path, algorithm: str) -> None:
    """The gradient of −Σ weight · log-prob over the tokens that were drawn, weights worked out by the formulas."""
    ours, plain = (thawed(load, 2, quantize="none") for _ in range(2))
    start = trained(ours)
    kept: list[LayerGRPOTrainer] = []
    gradients: dict[int, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        gradients.update({id(p): p.grad.clone() for group in optimizer.param_groups for p in group["params"]})

    class Kept(LayerGRPOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
            kept.append(self)
            return super()._prepare_inputs(generation_batch)

    settings = {"optimizer": "adamw", "steps": 1, "lr": 1e-6, "max_grad_norm": 1e9, "beta": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midtune.rl.training.LayerGRPOTrainer", Kept)
        patch.setattr("torch.optim.AdamW.step", keep)
        train(ours, tmp_path, algorithm=algorithm, gigpo_omega=0.5, gigpo_gamma=0.9, **settings)
    trainer = kept[0]
    assert torch.equal(trained(ours), start)
    (rollout,) = [part["rollout"] for part in trainer._buffered_inputs]
    episodes, rewards = trainer._episodes, trainer._rewards.reshape(-1, 4)
    weights = torch.zeros(rollout.completion_ids.shape)
    if algorithm == "gigpo":
        played = [turns_of(episode, reward) for episode, reward in zip(episodes, rewards.flat, strict=True)]
        advantages = gigpo(rewards, played, omega=0.5, gamma=0.9)
        assert any(len(set(turns.tolist())) > 1 for turns in advantages)
    else:
        advantages = [
            np.full(len(episode.turns), value)
            for episode, value in zip(episodes, group_relative(rewards).flat, strict=True)
        ]
    total = sum(sum(episode.drawn) for episode in episodes)
    for row, (episode, values) in enumerate(zip(episodes, advantages, strict=True)):
        divisor = total if algorithm == "gigpo" else len(episodes) * sum(episode.drawn)
        for turn, value in zip(episode.turns, values, strict=True):
            weights[row, turn.start : turn.stop] = value / divisor
    log_probs, _ = plain_log_probs(plain, rollout, 1.0)
    (-(log_probs * weights).sum()).backward()
    theirs = plain.trained_parameters()
    for name, parameter in ours.trained_parameters().items():
        assert theirs[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(gradients[id(parameter)], theirs[name].grad, atol=1e-5, rtol=1e-3)


def test_kl_counts_drawn_tokens_only(load: Load, tmp_path: Path) -> None:
    metrics = train(thawed(load, 2), tmp_path, beta=0.1)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[1]["kl"] > 1e-9


@pytest.mark.parametrize("algorithm", ["gigpo", "bnpo"])
def test_slices_of_an_update_add_up(load: Load, tmp_path: Path, algorithm: str) -> None:
    moved = []
    for rows in (4, None):
        policy = thawed(load, 2, quantize="none")
        start = trained(policy)
        train(policy, tmp_path, algorithm=algorithm, steps=1, update_rows=rows)
        moved.append(trained(policy) - start)
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 1e-2


def test_a_reward_of_the_file_sees_the_environments(load: Load, tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(environments: list[Corridor], width: list[int], **_: Any) -> list[float]:
        seen.extend(width)
        assert [environment.width - 2 for environment in environments] == width
        return [float(environment.place) for environment in environments]

    metrics = train(thawed(load, 2), tmp_path, reward, steps=1)
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
        rows = [{**row, "question": str(row["width"])} for row in ROWS]
        train_blocks(
            policy,
            rows,
            OWN,
            settings_of(steps=3, algorithm="gigpo", max_new_tokens=60),
            folder=tmp_path / folder,
            seed=0,
            meter=Meter(policy.device),
            game=game(),
            **arguments,
        )
        return policy

    straight = run("straight")
    run("run", stop_after=1)
    assert torch.equal(trained(run("run", resume_from=tmp_path / "run" / "checkpoint-1")), trained(straight))
