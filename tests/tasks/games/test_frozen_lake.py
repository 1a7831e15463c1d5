"""FrozenLake, as textarena has it."""

from __future__ import annotations

from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward
from tests.tasks.toy_data import load


def lake(**settings: Any) -> Task:
    pytest.importorskip("textarena")
    return load("frozen-lake", **{"train_size": 30, "eval_size": 10, **settings})


def test_a_lake_shows_its_board_and_rewards_the_goal() -> None:
    task = lake(prompt_format="plain")
    check_reward(task)
    assert task.game is not None
    row = task.train[0]
    (match,) = task.game.matches(1)
    shown = match.reset(row)["prompt"].removeprefix(row["prompt"])
    *board, last = shown.splitlines()
    assert last == "Move:"
    fields = [field for line in board for field in line.split()]
    assert sorted(fields) == sorted(["P", "G", "H", "H", *"....."])
    assert match.step("somewhere") == (shown, 0.0)
    board_of = {field: place for place, field in enumerate(fields)}
    reached = shortest(fields, board_of["P"], board_of["G"])
    for move in reached[:-1]:
        assert match.step(f" {move}, I think") == (match.state, 0.0)
        assert not match.over
    assert match.step(reached[-1])[1] == 1.0
    assert match.over


def shortest(fields: list[str], start: int, goal: int) -> list[str]:
    """The moves of a shortest way on a board of 3 by 3."""
    moves = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    ways: dict[int, list[str]] = {start: []}
    for place in (queue := [start]):
        for move, (down, right) in moves.items():
            row, column = place // 3 + down, place % 3 + right
            there = 3 * row + column
            if 0 <= row < 3 and 0 <= column < 3 and there not in ways and fields[there] != "H":
                ways[there] = [*ways[place], move]
                queue.append(there)
    return ways[goal]


def test_a_hole_ends_it_without_a_reward() -> None:
    task = lake()
    assert task.game is not None
    (match,) = task.game.matches(1)
    for row in task.train:
        match.reset(row)
        for _ in range(40):
            match.step("down")
            match.step("right")
            if match.over:
                break
        if match.over and task.reward(environments=[match.environment]) == [0.0]:
            return
    raise AssertionError("no board has a hole on that way")


def test_boards_of_training_and_evaluation_differ_and_a_seed_fixes_them() -> None:
    task = lake(seed=1)
    questions = [{row["question"] for row in side} for side in (task.train, task.held_out)]
    assert not questions[0] & questions[1]
    assert [len(side) for side in questions] == [30, 10]
    assert lake(seed=1).train == task.train
    assert lake(seed=2).train != task.train
    assert lake(seed=1).fingerprint == task.fingerprint != lake(seed=1, max_turns=3).fingerprint


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 2}, r"no argument `depth`; it has size \(3\), holes \(2\)"),
        ({"size": 2.5}, "give a whole number"),
        ({"size": 2, "holes": 2}, "no way around 2 holes"),
    ],
)
def test_a_lake_that_cannot_be_made_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lake(args=args)
