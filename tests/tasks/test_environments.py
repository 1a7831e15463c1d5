from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError, MidtuneError
from midtune.tasks import Task, check_reward, load_task
from midtune.tasks.environments import Episode

LAKE = str(Path(__file__).parents[2] / "recipes" / "frozen_lake.py")
MINIMAL = """
def rows():
    return [{"prompt": "guess", "secret": n} for n in range(20)]

class Environment:
    def reset(self, secret, **row):
        self.secret = secret

    def step(self, action):
        return "wrong", float(action == str(self.secret)), False
"""


def task_of(name: str, **settings: Any) -> Task:
    return load_task(
        name, **{"args": {}, "reward": None, "train_size": 8, "eval_size": 4, "seed": 0, **settings}
    )


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "own.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_rows_with_one_prompt_are_told_apart_by_their_other_columns(written: Callable[[str], str]) -> None:
    task = task_of(written(MINIMAL))
    secrets = [row["secret"] for row in task.train + task.held_out]
    assert len(task.train) == 8 and len(task.held_out) == 4 and len(set(secrets)) == 12
    assert {row["question"] for row in task.train} == {"guess"}
    check_reward(task)


def test_an_episode_keeps_the_state_of_each_step_and_its_reward(written: Callable[[str], str]) -> None:
    task = task_of(written(MINIMAL))
    assert task.environment is not None
    episode = Episode(task.environment, {"prompt": "guess", "secret": 7})
    episode.act("3")
    episode.act("7")
    # Without `state`, it is what was observed last.
    assert episode.states == [None, "wrong"]
    assert episode.rewards == [0, 1] and not episode.done


def test_an_environment_gives_the_rewards_alone(written: Callable[[str], str]) -> None:
    name = written(MINIMAL)
    with pytest.raises(InputError, match="gives the rewards; leave out --reward exact"):
        task_of(name, reward="exact")
    with pytest.raises(MidtuneError, match="come from its environment"):
        task_of(name).score(completions=[])
    both = MINIMAL + "\ndef reward(completions, **columns):\n    return [0.0] * len(completions)\n"
    with pytest.raises(InputError, match="`reward` and `Environment`"):
        task_of(written(both))


def test_a_broken_environment_is_found_before_anything_is_trained(written: Callable[[str], str]) -> None:
    task = task_of(written(MINIMAL.replace('"wrong", ', "")))
    with pytest.raises(InputError, match="Environment.step returned"):
        check_reward(task)


def test_a_lake_is_crossed_by_the_moves_that_lead_there() -> None:
    task = task_of(LAKE, prompt_format="plain")
    assert task.environment is not None
    row = {"prompt": "", "start": [1, 1], "goal": [2, 3], "hole": [2, 1]}
    episode = Episode(task.environment, row)
    assert episode.observation == "at 1 1, goal 2 3, hole 2 1"
    # Over the edge and without a move one stays.
    for action in ("up", "jump", "right", "Right.", "down"):
        assert not episode.done
        episode.act(action)
    assert episode.done and episode.rewards == [0, 0, 0, 0, 1]
    assert episode.states == [(1, 1), (1, 1), (1, 1), (1, 2), (1, 3)]
    fallen = Episode(task.environment, row)
    fallen.act("down")
    assert fallen.done and fallen.rewards == [0]
