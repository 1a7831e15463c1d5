"""Tasks that are played in turns, by a class in a task file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward
from midtune.tasks.environment import Game, Match, check_environment, reward_of
from tests.rollout.corridor import Corridor
from tests.tasks.toy_data import load
from tests.tasks.toy_game import OWN


def own_task(folder: Path, code: str = OWN, **settings: Any) -> Task:
    path = folder / "guess.py"
    path.write_text(code)
    return load(path, **{"train_size": 8, "eval_size": 4, **settings})


def begun(task: Task, number: int = 0) -> Match:
    assert task.game is not None
    (match,) = task.game.matches(1)
    match.reset(task.train[number])
    return match


def test_a_class_in_a_task_file_is_played(tmp_path: Path) -> None:
    task = own_task(tmp_path, prompt_format="plain", max_turns=3, turn_tokens=5)
    assert task.game is not None
    assert (task.game.max_turns, task.game.turn_tokens) == (3, 5)
    assert (len(task.train), len(task.held_out)) == (8, 4)
    check_reward(task)
    match = begun(task)
    assert match.reset(task.train[0])["prompt"] == "Guess. It is below 3."
    right = task.train[0]["seed"] % 3
    assert match.step(str((right + 1) % 3)) == ("Wrong.", 0.0)
    assert match.state == "Wrong."
    assert match.step("none") == ("That is no number.", 0.0)
    assert not match.over
    assert match.step(str(right)) == ("Right.", 0.5)
    assert match.over
    assert task.reward(environments=[match.environment]) == [0.5]


def test_a_command_for_one_turn_refuses_it(tmp_path: Path) -> None:
    task = own_task(tmp_path)
    with pytest.raises(InputError, match="guess.py is played in turns, and it knows tasks of one turn only"):
        task.require_one_turn("it")
    replace(task, game=None).require_one_turn("it")


def test_what_is_shown_first_ends_the_last_message(tmp_path: Path) -> None:
    task = own_task(tmp_path)
    row = begun(task).reset(task.train[0])
    assert row["prompt"] == [{"role": "user", "content": "Guess. It is below 3."}]
    assert task.train[0]["prompt"] == [{"role": "user", "content": "Guess."}]


def test_the_file_may_judge_episodes_itself(tmp_path: Path) -> None:
    code = OWN + "\ndef reward(environments, seed, **columns):\n    return [float(s) for s in seed]\n"
    task = own_task(tmp_path, code)
    assert task.reward(environments=[None, None], seed=[2, 5]) == [2.0, 5.0]


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ("class Environment:", "Environment = 3\nclass Other:", "is not a class"),
        ("def step", "def walk", "has no `step`; write `def step"),
        ("def reset", "def begin", "has no `reset`"),
        ("def get_reward", "def points", "no `get_reward`, and the file no `reward`"),
        (
            "    def reset",
            "    def __init__(self, size):\n        pass\n\n    def reset",
            "made without arguments",
        ),
        ("seed % 3", "seed % 0", "`reset` of the environment of .* raised ZeroDivisionError"),
        ("return float(self.done)", "return self.won", "`get_reward` of .* raised AttributeError"),
        (
            "return float(self.done)",
            "return float('nan')",
            "`get_reward` of .* returned nan; .* a finite number",
        ),
        (
            'raise ValueError("That is no number.")',
            'return ("Wrong.", 0.0, True)',
            r"`step` of .* returned .*; it must return the text",
        ),
        ("raise ValueError(", "raise KeyError(", "`step` of .* raised KeyError"),
        ("if not action.isdigit():", "if self.missing:", "`step` of .* raised AttributeError"),
        (
            '" It is below 3."',
            "str(id(object())) + repr(__import__('random').random())",
            "differently each time",
        ),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(
    tmp_path: Path, found: str, wanted: str, message: str
) -> None:
    assert found in OWN
    with pytest.raises(InputError, match=message):
        check_reward(own_task(tmp_path, OWN.replace(found, wanted)))


def test_another_reward_cannot_judge_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="judged by its environment, but the reward numeric was given"):
        own_task(tmp_path, reward="numeric")


def test_a_reward_that_is_no_number_is_refused() -> None:
    class Vague(Corridor):
        def get_reward(self) -> Any:
            return "much"

    with pytest.raises(InputError, match="`get_reward` of it returned 'much'"):
        Match("it", Vague()).reset({"prompt": "", "width": 2})


def test_a_state_that_cannot_be_compared_is_refused() -> None:
    class Listed(Corridor):
        state = [1]  # type: ignore[assignment]

    match = Match("it", Listed())
    match.reset({"prompt": "", "width": 2})
    with pytest.raises(InputError, match="`state` of it is a list"):
        _ = match.state


def test_environments_are_made_once_and_rewound() -> None:
    game = Game("the corridor", Corridor, max_turns=3)
    first, second = game.matches(2)
    assert game.matches(1) == [first]
    for match in (first, second):
        match.reset({"prompt": "", "width": 4})
    environment = first.environment
    first.step("abc")
    first.rewind()
    assert (environment.place, first.environment) == (0, environment)
    check_environment(Corridor, "it", tools=False)
    assert reward_of(Corridor, "it", ["verifier"])(environments=[environment]) == [0.0]
