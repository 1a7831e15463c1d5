"""Advantages and the weight of every token in the loss, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from midtune.rl.advantages import (
    Turns,
    discounted_returns,
    gigpo,
    group_relative,
    leave_one_out,
    turn_relative,
)
from midtune.rl.algorithms import own_advantages
from midtune.rl.tail import completion_log_probs
from tests.rl.toy_training import DecidedSampler, Load, settings_of, thawed, trainer_of

NAN = math.nan


# The advantages.


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    # 1 against (0 + 0 + 2) / 3; 0 against 3 / 3; 2 against 1 / 3.
    found = leave_one_out(np.array([[1.0, 0.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]]))
    assert found[0] == pytest.approx([1 / 3, -1, -1, 5 / 3])
    assert found[1].tolist() == [0, 0, 0, 0]


def test_what_could_not_be_judged_counts_for_nobody() -> None:
    rewards = np.array([[1.0, NAN, 0.0, 2.0], [NAN, NAN, NAN, 1.0]])
    assert leave_one_out(rewards)[0] == pytest.approx([0, 0, -1.5, 1.5])
    assert group_relative(rewards)[0] == pytest.approx([0, 0, -1, 1], rel=2e-4)
    assert leave_one_out(rewards)[1].tolist() == group_relative(rewards)[1].tolist() == [0, 0, 0, 0]


def test_group_relative_divides_by_the_deviation_of_the_sample() -> None:
    # Mean 0.25, deviation √((0.75² + 3 · 0.25²) / 3) = 0.5.
    found = group_relative(np.array([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]))
    assert found[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=3e-4)
    assert found[1].tolist() == [0, 0, 0, 0]


def test_returns_discount_what_comes_later() -> None:
    assert discounted_returns([1, 0, 4], 0.5).tolist() == [2, 2, 4]
    assert discounted_returns([], 0.5).tolist() == []


def test_turns_are_compared_where_their_states_are_equal() -> None:
    # Discounted by 0.5: the first episode's returns are 0.5 and 1, the second's 0, 0 and 0, the third's 1.
    episodes = [Turns(["a", "b"], [0, 1]), Turns(["a", "c", "b"], [0, 0, 0]), Turns(["a"], [1])]
    first, second, third = turn_relative(episodes, 0.5)
    # In `a` 0.5, 0 and 1: mean 0.5, deviation 0.5. In `b` 1 and 0: deviation √0.5. In `c` nothing to compare.
    assert first == pytest.approx([0, math.sqrt(0.5)], rel=3e-4)
    assert second == pytest.approx([-1, 0, -math.sqrt(0.5)], rel=3e-4)
    assert third == pytest.approx([1], rel=3e-4)


def test_a_state_that_an_episode_comes_back_to_counts_each_time() -> None:
    # In `a` the first episode returns 0.25 and 1, the second 0.
    (first, second) = turn_relative([Turns(["a", "b", "a"], [0, 0, 1]), Turns(["a"], [0])], 0.5)
    mean = 1.25 / 3
    deviation = math.sqrt(((0.25 - mean) ** 2 + (1 - mean) ** 2 + mean**2) / 2)
    assert first == pytest.approx([(0.25 - mean) / deviation, 0, (1 - mean) / deviation], rel=3e-4)
    assert second == pytest.approx([-mean / deviation], rel=3e-4)


def test_without_repeated_states_gigpo_is_grpo() -> None:
    episodes = [Turns(["a", "b"], [0, 1]), Turns(["c"], [0]), Turns(["d", "e"], [0, 0])]
    rewards = np.array([[1.0, 0.0, 0.0]])
    found = gigpo(rewards, episodes, omega=1, gamma=0.9)
    (whole,) = group_relative(rewards)
    assert [turns.tolist() for turns in found] == [[whole[0]] * 2, [whole[1]], [whole[2]] * 2]


def test_gigpo_adds_the_two_and_keeps_groups_apart() -> None:
    # Two groups of two. Episodes: ±√0.5 in the first group, equal in the second. In `a` of the first group the
    # returns are 0.5 and 0, so ±√0.5 too; `a` of the second group is another state, with returns 2 and 0.
    episodes = [Turns(["a", "b"], [0, 1]), Turns(["a"], [0]), Turns(["a"], [2]), Turns(["a", "a"], [0, 2])]
    found = gigpo(np.array([[1.0, 0.0], [2.0, 2.0]]), episodes, omega=3, gamma=0.5)
    half = math.sqrt(0.5)
    assert found[0] == pytest.approx([half + 3 * half, half], rel=3e-4)
    assert found[1] == pytest.approx([-half - 3 * half], rel=3e-4)
    # Returns in `a` are 2, then 1 and 2: mean 5/3, deviation √(1/3).
    assert found[2] == pytest.approx([3 * math.sqrt(1 / 3)], rel=3e-4)
    assert found[3] == pytest.approx([-3 * 2 * math.sqrt(1 / 3), 3 * math.sqrt(1 / 3)], rel=3e-4)


def test_without_a_scale_both_halves_are_differences_from_the_mean() -> None:
    # Episodes: 1 and 0 around 0.5. In `a` the returns are 0.5 and 0, around 0.25; `b` was met once.
    episodes = [Turns(["a", "b"], [0, 1]), Turns(["a"], [0])]
    found = gigpo(np.array([[1.0, 0.0]]), episodes, omega=2, gamma=0.5, scaled=False)
    assert [turns.tolist() for turns in found] == [[0.5 + 2 * 0.25, 0.5], [-0.5 - 2 * 0.25]]


def test_weight_0_leaves_the_episode_alone() -> None:
    episodes = [Turns(["a"], [1]), Turns(["a"], [0])]
    found = gigpo(np.array([[1.0, 0.0]]), episodes, omega=0, gamma=0.9)
    assert np.concatenate(found).tolist() == group_relative(np.array([[1.0, 0.0]]))[0].tolist()


# The weight of each token: minus the derivative of the loss by its log-prob.

LENGTHS = [1, 2, 3, 4]
IDS = [list(range(10, 10 + length)) for length in LENGTHS]
REWARDS = [1.0, 0.0, 0.0, 1.0]
LONGEST = 8
# Mean 0.5, deviation √(4 · 0.25 / 3), to which TRL adds 1e-4.
SCALED = 0.5 / (math.sqrt(1 / 3) + 1e-4)


@pytest.mark.parametrize(
    ("algorithm", "advantage", "divisors"),
    [
        # The mean over a completion's tokens, then over the group.
        ("grpo", SCALED, [4 * 1, 4 * 2, 4 * 3, 4 * 4]),
        # No deviation, and one constant in place of lengths: the group times the longest completion there can be.
        ("dr_grpo", 0.5, [4 * LONGEST] * 4),
        # The mean over all ten tokens.
        ("dapo", SCALED, [10] * 4),
        ("bnpo", SCALED, [10] * 4),
        # 1 against the mean 1/3 of the others; the sum over a completion's tokens, then the mean over the group.
        ("rloo", 2 / 3, [4] * 4),
    ],
)
def test_the_weight_of_every_token(
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    advantage: float,
    divisors: list[int],
) -> None:
    leaves: list[torch.Tensor] = []

    def leaf(*arguments: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropies = completion_log_probs(*arguments, **settings)
        leaves.append(log_probs.detach().requires_grad_())
        return leaves[-1] + 0 * log_probs, entropies

    monkeypatch.setattr("midtune.rl.trainer.completion_log_probs", leaf)
    settings = settings_of(steps=1, prompts_per_step=1, algorithm=algorithm, max_new_tokens=LONGEST)
    trainer = trainer_of(
        DecidedSampler(thawed(load, 2, quantize="none"), lambda prompts: IDS),
        tmp_path,
        settings,
        lambda completions, **_: REWARDS,
        advantages=own_advantages(settings),
    )
    trainer.train()
    signs = [1, -1, -1, 1]
    expected = [
        [sign * advantage / divisor if token < length else 0.0 for token in range(4)]
        for sign, divisor, length in zip(signs, divisors, LENGTHS, strict=True)
    ]
    (found,) = leaves
    assert found.grad is not None
    torch.testing.assert_close(-found.grad, torch.tensor(expected), rtol=1e-4, atol=1e-7)
