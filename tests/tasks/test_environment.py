"""Tasks that are played in turns: one's own class, and the games that come from packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward, load_task
from midtune.tasks.environment import Game, Match, check_environment, reward_of
from midtune.tasks.games.games import TextWorld
from tests.rollout.corridor import Corridor

OWN = '''
def rows():
    return [{"prompt": "Guess.", "seed": seed} for seed in range(12)]

class Environment:
    def reset(self, seed, **row):
        self.number, self.done, self.tries = seed % 3, False, 0
        return " It is below 3."

    def step(self, action):
        """Guess a number."""
        if not action.isdigit():
            raise ValueError("That is no number.")
        self.tries += 1
        self.done = int(action) == self.number
        return "Right." if self.done else "Wrong."

    def get_reward(self):
        return float(self.done) / max(self.tries, 1)
'''


def own_task(folder: Path, code: str = OWN, **settings: Any) -> Task:
    path = folder / "guess.py"
    path.write_text(code)
    given = {"args": {}, "reward": None, "train_size": 8, "eval_size": 4, "seed": 0, **settings}
    return load_task(str(path), **given)


def lake(**settings: Any) -> Task:
    pytest.importorskip("textarena")
    given = {"args": {}, "reward": None, "train_size": 30, "eval_size": 10, "seed": 0, **settings}
    return load_task("frozen-lake", **given)


def begun(task: Task, number: int = 0) -> Match:
    assert task.game is not None
    (match,) = task.game.matches(1)
    match.reset(task.train[number])
    return match


# One's own.


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


# FrozenLake.


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


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package textworld; .*midtune\[textworld\]"):
        load_task("textworld", args={}, reward=None, train_size=4, eval_size=2, seed=0)


# TextWorld.


def test_a_quest_gives_its_points() -> None:
    pytest.importorskip("textworld")
    match = Match("it", TextWorld())
    shown = match.reset({"prompt": "", "seed": 3, "rooms": 1, "objects": 2, "quest": 1})["prompt"]
    commands = shown.rpartition("You can: ")[2].removesuffix("\nCommand:").split(", ")
    assert "unlock box with keycard" in commands
    assert match.step("look")[1] == 0.0
    assert not match.over
    assert match.step("unlock box with keycard\nlook")[1] == 1.0
    assert match.over
