from __future__ import annotations

import math

import pytest

from midtune.rl.advantages import gigpo, group_relative, leave_one_out, step_returns


def test_a_group_is_centred_and_scaled_by_the_deviation_of_a_sample() -> None:
    # Mean 2, deviation √((1 + 0 + 1) / 2) = 1.
    assert group_relative([1, 2, 3]) == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001])
    assert group_relative([1, 2, 3], scaled=False).tolist() == [-1, 0, 1]
    # Mean 0.25, deviation √((3 · 0.0625 + 0.5625) / 3) = 0.5: the success gets 0.75 / 0.5.
    assert group_relative([0, 1, 0, 0]) == pytest.approx([-0.5, 1.5, -0.5, -0.5], rel=1e-3)


@pytest.mark.parametrize("advantage", [group_relative, leave_one_out])
def test_equal_rewards_and_one_alone_get_nothing(advantage: object) -> None:
    assert callable(advantage)
    assert advantage([0.5, 0.5, 0.5]).tolist() == [0, 0, 0]
    assert advantage([7.0]).tolist() == [0]


def test_leave_one_out_takes_the_mean_of_the_others() -> None:
    # 1 − 2.5, 2 − 2, 3 − 1.5.
    assert leave_one_out([1, 2, 3]).tolist() == [-1.5, 0, 1.5]
    # G / (G − 1) times the difference from the mean: 4/3 · (1 − 1/4).
    assert leave_one_out([1, 0, 0, 0]) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_returns_are_discounted_from_the_end() -> None:
    # 4; 2 + 0.5 · 4 = 4; 1 + 0.5 · 4 = 3.
    assert step_returns([1, 2, 4], 0.5).tolist() == [3, 4, 4]
    assert step_returns([0, 0, 1], 1.0).tolist() == [1, 1, 1]
    assert step_returns([], 0.9).tolist() == []


def test_gigpo_compares_steps_taken_in_one_state() -> None:
    # Episode returns 1 and 0, mean 0.5. Step returns by γ = 0.5: [0.5, 1] and [0, 0, 0].
    # In `a` 0.5, 0 and 0 (the second episode comes back), mean 1/6; `b` is met once; `c` once.
    found = gigpo([["a", "b"], ["a", "c", "a"]], [[0, 1], [0, 0, 0]], gamma=0.5, omega=1, scaled=False)
    assert found[0] == pytest.approx([0.5 + 1 / 3, 0.5])
    assert found[1] == pytest.approx([-0.5 - 1 / 6, -0.5, -0.5 - 1 / 6])


def test_gigpo_scales_both_terms() -> None:
    # Two values x > y: (x − y) / 2 over a deviation of (x − y) / √2 is 1 / √2, in either term.
    found = gigpo([["a"], ["a"]], [[1], [0]], gamma=1, omega=2)
    assert found[0] == pytest.approx([3 / math.sqrt(2)], rel=1e-3)
    assert found[1] == pytest.approx([-3 / math.sqrt(2)], rel=1e-3)


def test_gigpo_without_repeated_states_is_the_advantage_of_the_episode() -> None:
    found = gigpo([[1, 2], [3, 4, 5]], [[0, 3], [1, 0, 0]], gamma=0.9, omega=1, scaled=False)
    assert [own.tolist() for own in found] == [[1, 1], [-1, -1, -1]]


def test_gigpo_tells_steps_apart_where_episodes_score_alike() -> None:
    # Both get 1, so their own terms are 0; from `a` it came in two steps or in one: 0.5 against 1.
    found = gigpo([["a", "b"], ["a"]], [[0, 1], [1]], gamma=0.5, omega=1, scaled=False)
    assert [own.tolist() for own in found] == [[-0.25, 0], [0.25]]
