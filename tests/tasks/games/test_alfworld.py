"""ALFWorld's tasks, on games that are made here in the form of its data."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward
from midtune.tasks.environment import Match
from midtune.tasks.games.alfworld import GAME, PROMPT, ALFWorld
from tests.tasks.toy_data import load

# A mug on a desk, and a drawer beside it.
PROBLEM = """
(define (problem plan_trial) (:domain alfred)
 (:objects agent1 - agent MugType - otype DeskType - rtype DrawerType - rtype
  loc_0 - location loc_1 - location loc_2 - location
  Mug_bar_1 - object Desk_bar_1 - receptacle Drawer_bar_1 - receptacle)
 (:init (= (total-cost) 0) (atLocation agent1 loc_0)
  (receptacleType Desk_bar_1 DeskType) (receptacleType Drawer_bar_1 DrawerType) (openable Drawer_bar_1)
  (objectType Mug_bar_1 MugType) (canContain DeskType MugType) (canContain DrawerType MugType)
  (pickupable Mug_bar_1) (receptacleAtLocation Desk_bar_1 loc_1) (receptacleAtLocation Drawer_bar_1 loc_2)
  (inReceptacle Mug_bar_1 Desk_bar_1) (objectAtLocation Mug_bar_1 loc_1))
 (:goal (exists (?r - receptacle ?o - object)
  (and (inReceptacle ?o ?r) (objectType ?o MugType) (receptacleType ?r DrawerType)))))
"""
WON = ["go to desk 1", "take mug 1 from desk 1", "go to drawer 1", "open drawer 1", "move mug 1 to drawer 1"]


def write_games(folder: Path, domain: str, grammar: str) -> None:
    for part, count in (("train", 8), ("valid_seen", 2), ("valid_unseen", 3)):
        for number in [*range(count), "Sliced"]:
            game = folder / "json_2.1.1" / part / f"pick-Mug-{number}" / "trial"
            game.mkdir(parents=True)
            told = {
                "pddl_domain": domain,
                "grammar": grammar.replace("UNKNOWN GOAL", "put a mug in drawer"),
                "pddl_problem": PROBLEM,
                # The first is one that nobody can win.
                "solvable": number != 0 or part != "train",
            }
            (game / GAME).write_text(json.dumps(told))


def alfworld(**settings: Any) -> Task:
    return load("alfworld", **{"train_size": 6, "eval_size": 2, **settings})


def install(monkeypatch: pytest.MonkeyPatch, missing: str | None = None) -> None:
    """What the games need, but for one package."""
    for name in ("alfworld", "fast_downward"):
        module = module_from_spec(ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, None if name == missing else module)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    install(monkeypatch)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    return tmp_path


def test_rows_are_games_that_can_be_won(installed: Path) -> None:
    write_games(installed, "", 'rhs": "Your task is to: UNKNOWN GOAL."')
    task = alfworld()
    games = {row["game"] for row in task.train}
    assert games <= {f"train/pick-Mug-{number}/trial" for number in range(1, 8)} and len(games) == 6
    assert {row["game"] for row in task.held_out} == {f"valid_seen/pick-Mug-{n}/trial" for n in range(2)}
    assert "put a mug in drawer" in task.train[0]["question"]
    unseen = alfworld(args={"unseen": 1}, eval_size=3)
    assert {row["game"].partition("/")[0] for row in unseen.held_out} == {"valid_unseen"}
    assert unseen.fingerprint != task.fingerprint
    assert alfworld().train == task.train != alfworld(seed=1).train


def test_a_broken_game_is_named(installed: Path) -> None:
    write_games(installed, "", "")
    (installed / "json_2.1.1/train/pick-Mug-3/trial" / GAME).write_text("{")
    with pytest.raises(InputError, match=r"pick-Mug-3.* is no game of ALFWorld .*; download it again"):
        alfworld(train_size=8)


def test_without_its_data_it_says_how_to_get_it(installed: Path) -> None:
    with pytest.raises(InputError, match=r"no games in .*train; download them with `alfworld-download`"):
        alfworld()


def test_the_default_folder_is_not_made(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALFWORLD_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=rf"no games in {tmp_path}/\.cache/alfworld/json_2.1.1/train"):
        alfworld()
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize("missing", ["alfworld", "fast_downward"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    install(monkeypatch, missing)
    with pytest.raises(InputError, match=r"needs the package alfworld; .*midtune\[alfworld\]"):
        alfworld()


def test_where_the_data_lies_makes_no_difference(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_games(installed / "here", "", 'rhs": "Your task is to: UNKNOWN GOAL."')
    monkeypatch.setenv("ALFWORLD_DATA", str(installed / "here"))
    before = alfworld(train_size=4)
    (installed / "here").rename(installed / "there")
    monkeypatch.setenv("ALFWORLD_DATA", str(installed / "there"))
    after = alfworld(train_size=4)
    assert (after.train, after.held_out, after.fingerprint) == (
        before.train,
        before.held_out,
        before.fingerprint,
    )


def test_an_episode_has_fifty_turns_unless_others_are_asked_for(installed: Path) -> None:
    write_games(installed, "", 'rhs": "Your task is to: UNKNOWN GOAL."')
    plain, short = alfworld(), alfworld(max_turns=3)
    assert plain.game is not None and short.game is not None
    assert (plain.game.max_turns, short.game.max_turns) == (50, 3)
    assert plain.fingerprint == alfworld(max_turns=50).fingerprint != short.fingerprint


@pytest.fixture
def playable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the package's own domain and grammar."""
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    info = pytest.importorskip("alfworld.info")
    pytest.importorskip("fast_downward")
    domain, grammar = (Path(path).read_text() for path in (info.ALFRED_PDDL_PATH, info.ALFRED_TWL2_PATH))
    write_games(tmp_path, domain, grammar)
    return tmp_path


def test_a_household_is_played(playable: Path) -> None:
    task = alfworld()
    check_reward(task)
    assert task.game is not None
    first, second = task.game.matches(2)
    assert isinstance(first.environment, ALFWorld)
    shown = first.reset(task.train[0])["prompt"][0]["content"]
    assert shown.startswith(PROMPT + "You are in the middle of a room.")
    assert "Your task is to: put a mug in drawer." in shown
    assert "['go to desk 1', 'go to drawer 1', 'inventory', 'look']." in shown
    assert second.reset(task.train[1])["prompt"][0]["content"] == shown
    won(first)
    # Each plays a game of its own, and an answer without tags is the action.
    assert second.step("fly")[0].startswith("Nothing happens.")
    assert second.step("go to desk 1")[0].startswith("You arrive at desk 1. On the desk 1, you see a mug 1.")
    first.rewind()
    assert not first.over and first.step("look")[1] == 0.0


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (
            "<think>a <b></think> <Action> Go to Desk 1\n</Action> or <action>look</action>",
            "You arrive at desk 1.",
        ),
        ("<action>go to drawer 1", "You arrive at drawer 1."),
        ("Inventory", "You are not carrying anything."),
        ("<action>open drawer 1</action>", "Nothing happens."),
        ("I would go to desk 1", "Nothing happens."),
        ("", "Nothing happens."),
    ],
)
def test_an_action_is_what_is_in_its_tags(playable: Path, said: str, answer: str) -> None:
    match = Match("it", ALFWorld())
    match.reset({"prompt": "", "game": "train/pick-Mug-1/trial"})
    shown, reward = match.step(said)
    assert shown.startswith(answer)
    assert (reward, match.over) == (0.0, False)


def test_the_translator_leaves_the_command_line_alone(playable: Path) -> None:
    before = [*sys.argv]
    Match("it", ALFWorld()).reset({"prompt": "", "game": "train/pick-Mug-1/trial"})
    assert sys.argv == before


def won(match: Match) -> None:
    for command in WON[:-1]:
        assert match.step(f"<think>Next.</think>\n<action> {command} </action>")[1] == 0.0
    assert match.step(f"<action>{WON[-1]}</action>")[1] == 1.0
    assert match.over
