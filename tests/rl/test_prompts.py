"""Which prompts a step trains on: the prediction by hand, and what it does to training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.rl import prompts
from midtune.rl.prompts import FEWEST_KNOWN, MOST_KNOWN, PromptChooser, predicted
from midtune.rl.training import in_order
from midtune.rollout.sampling import Sampling
from midtune.tasks import Row
from tests.rl.toy_training import (
    Load,
    question_rows,
    sampler_of,
    short_questions_only,
    thawed,
    train,
    trained,
)


def test_prediction_from_two_states_worked_out_by_hand() -> None:
    known = torch.tensor([[0.0], [1.0]])
    found = predicted(known, torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [1.0], [0.5], [50.0]]))
    # The kernel is 1 at no distance and 1/e at the median one, so (1 + ridge) w + w'/e = ∓1/2 with w' = -w.
    near = 0.5 - 0.5 * (1 - 1 / math.e) / (2 - 1 / math.e)
    # Half way both pull alike, and far away nothing is known but the mean.
    assert found.tolist() == pytest.approx([near, 1 - near, 0.5, 0.5], abs=1e-6)


def test_prediction_does_not_depend_on_units_and_finds_a_region() -> None:
    draw = torch.Generator().manual_seed(0)
    known, asked = torch.randn(200, 5, generator=draw), torch.randn(100, 5, generator=draw)

    def inside(states: torch.Tensor) -> torch.Tensor:
        return (states[:, :2].square().sum(1) < 1).float()

    found = predicted(known, inside(known), asked)
    scales = torch.tensor([1e-3, 1.0, 10.0, 1e3, 1e-2])
    assert torch.allclose(found, predicted(known * scales, inside(known), asked * scales), atol=1e-5)
    best = found.argsort(descending=True)[:25]
    assert inside(asked).mean() < 0.6 < 0.8 < inside(asked)[best].mean()


def test_prediction_from_states_that_are_all_alike_is_the_mean() -> None:
    found = predicted(torch.ones(40, 3), torch.tensor([0.0, 1.0] * 20), torch.ones(2, 3))
    assert found.tolist() == pytest.approx([0.5, 0.5])


def numbered_rows(count: int) -> list[Row]:
    """Questions of which every third is short."""
    texts = ["a" * (1 + place % 3 * 8) + str(place) for place in range(count)]
    return [{"prompt": [{"role": "user", "content": text}], "question": text} for text in texts]


def chooser_of(load: Load, rows: list[Row], count: int = 4, steps: int = 80) -> PromptChooser:
    order = in_order(range(len(rows)), 4 * count * steps, seed=0)
    return PromptChooser(thawed(load, 2, quantize="none"), rows, order, count=count, candidates=4 * count)


def test_states_are_those_that_enter_the_trained_block_after_the_prompt(load: Load) -> None:
    rows = question_rows()
    chooser = chooser_of(load, rows)
    rollout = sampler_of(chooser.policy).sample(
        [row["prompt"] for row in rows], Sampling(group_size=1, max_new_tokens=2), boundary_block=2
    )
    assert rollout.boundary is not None
    found = chooser._states_of(range(len(rows)))
    assert torch.allclose(found, rollout.boundary.prompt[:, -1], atol=1e-5)
    # They are made once, and in the same passes whatever is asked for first.
    again = chooser_of(load, rows)
    assert torch.equal(again._states_of([5]), found[5:])
    assert torch.equal(again._states_of(range(6)), found)


def test_prompts_are_taken_in_turn_until_enough_is_known(load: Load) -> None:
    chooser = chooser_of(load, numbered_rows(60))
    for step in range(FEWEST_KNOWN // 4):
        assert chooser.choose(step) == [chooser.rows[row] for row in chooser._order[step * 16 :][:4]]
        chooser.learn(torch.rand(4, 3))


def test_the_first_is_taken_in_turn_and_the_others_by_how_far_their_rewards_differed(load: Load) -> None:
    chooser = chooser_of(load, numbered_rows(60))
    shares = []
    for step in range(40):
        rows = chooser.choose(step)
        short = [len(row["question"]) < 5 for row in rows]
        if step * 4 >= FEWEST_KNOWN:
            assert rows[0] == chooser.rows[chooser._order[step * 16]]
            assert len({row["question"] for row in rows}) == 4
        shares.append(sum(short[1:]) / 3)
        chooser.learn(torch.tensor([[0.0, 1.0] if differs else [1.0, 1.0] for differs in short]))
    # A third of the questions are short.
    assert sum(shares[:8]) / 8 < 0.5 < 0.9 < sum(shares[20:]) / 20


def test_a_step_may_take_more_prompts_than_there_are(load: Load) -> None:
    chooser = chooser_of(load, question_rows(), count=8, steps=8)
    for step in range(8):
        rows = chooser.choose(step)
        assert len(rows) == 8
        assert len({row["question"] for row in rows}) >= 3
        chooser.learn(torch.rand(8, 3))


def test_no_more_groups_are_remembered_than_needed_and_unknown_rewards_teach_nothing(load: Load) -> None:
    chooser = chooser_of(load, numbered_rows(60))
    for step in range(MOST_KNOWN // 4 + 2):
        chooser.choose(step)
        chooser.learn(torch.full((4, 3), math.nan))
    assert [len(kept) for kept in chooser.state().values()] == [MOST_KNOWN, MOST_KNOWN]
    assert not chooser.state()["values"].any()


def test_fewer_groups_are_equal(load: Load, tmp_path: Path) -> None:
    shares = {}
    for how in ("uniform", "auto"):
        _, metrics = train(
            thawed(load, 2), tmp_path / how, short_questions_only, steps=14, prompts_per_step=4, prompts=how
        )
        shares[how] = sum(line["equal_groups"] for line in metrics[8:]) / 6
    assert shares["uniform"] > 0.4
    assert shares["auto"] <= 0.25


def test_resuming_chooses_the_same(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "FEWEST_KNOWN", 4)
    settings: dict[str, Any] = {"steps": 6, "lr": "auto", "prompts": "auto"}
    straight, resumed = thawed(load, 2), thawed(load, 2)
    _, expected = train(straight, tmp_path / "straight", short_questions_only, **settings)
    _, before = train(thawed(load, 2), tmp_path / "run", short_questions_only, **settings, stop_after=3)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    _, after = train(resumed, tmp_path / "run", short_questions_only, **settings, resume_from=checkpoint)
    exact = ("step", "reward", "equal_groups", "loss", "lr")
    assert [[line[name] for name in exact] for line in before + after] == [
        [line[name] for name in exact] for line in expected
    ]
    assert torch.equal(trained(resumed), trained(straight))
