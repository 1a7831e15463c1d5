from __future__ import annotations

import pytest

from midtune.rl.collapse import Collapse, collapse_in, find_collapse

# Mean 0.5, variance 10 x 0.1² / 9: three standard errors of the mean are 0.1.
LEARNED = [0.4, 0.6] * 5


def test_a_run_that_falls_from_its_best_and_stays_there() -> None:
    found = find_collapse([*LEARNED, *[0.0] * 10], [0.5] * 10 + [1.0] * 10)
    assert found == Collapse(20, 0.5, 0.0)
    assert str(found).startswith(
        "in steps 11 to 20 all completions of each prompt got equal rewards, and their mean"
    )
    assert "was 0, after 0.5 at best" in str(found)


def test_what_comes_later_does_not_move_it() -> None:
    assert find_collapse([*LEARNED, *[0.0] * 15, *LEARNED], [0.5] * 10 + [1.0] * 15 + [0.5] * 10) == Collapse(
        20, 0.5, 0.0
    )


@pytest.mark.parametrize(
    ("rewards", "equal"),
    [
        # Nine steps are no ten.
        ([*LEARNED, *[0.0] * 9], [0.5] * 10 + [1.0] * 9),
        # One group still tells completions apart.
        ([*LEARNED, *[0.0] * 10], [0.5] * 10 + [1.0] * 5 + [0.9] + [1.0] * 4),
        # All solved.
        ([*LEARNED, *[1.0] * 10], [0.5] * 10 + [1.0] * 10),
        # Never unequal: another check stops such a run.
        ([*LEARNED, *[0.0] * 10], [1.0] * 20),
        # 0.09 below: less than three standard errors, 0.1.
        ([*LEARNED, *[0.41] * 10], [0.5] * 10 + [1.0] * 10),
        # From 1 to 0.95, where rewards ranged over 1: less than a tenth of that.
        ([0.0, *[1.0] * 10, *[0.95] * 10], [0.5] * 11 + [1.0] * 10),
        # A hard task, where a few of the first steps had luck: mean 0.15, three standard errors 0.23.
        ([0.5, 0, 0, 0.5, 0, 0, 0, 0, 0.5, 0, *[0.0] * 10], [0.5] * 10 + [1.0] * 10),
        ([], []),
    ],
)
def test_what_is_no_collapse(rewards: list[float], equal: list[float]) -> None:
    assert find_collapse(rewards, equal) is None


def test_steps_without_a_reward_are_left_out() -> None:
    rewards = [*LEARNED, *[0.0] * 10]
    equal = [0.5] * 10 + [1.0] * 10
    steps = [{"reward": reward, "equal_groups": share} for reward, share in zip(rewards, equal, strict=True)]
    found = collapse_in([{"reward": None, "equal_groups": 1.0}, *steps])
    assert found is not None and found == find_collapse(rewards, equal)
    assert collapse_in(steps[:10]) is None
