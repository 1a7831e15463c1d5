"""Runs of a task that is played in an environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.report.terminal import Terminal
from midtune.stages import evaluate, probe, train
from tests.stages.conftest import Configured

COUNTING = """
from tests.rollout.counting import Counting as Environment

def rows():
    return [{"prompt": "count", "turns": 2 + n % 3, "number": n} for n in range(30)]
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "counting.py"
    path.write_text(COUNTING, encoding="utf-8")
    return str(path)


def test_a_run_plays_learns_and_is_scored_again(
    configured: Configured, tmp_path: Path, terminal: Terminal, task: str
) -> None:
    settings = {"task__name": task, "task__reward": None, "training__algorithm": "gigpo"}
    config = configured(**settings, training__max_turns=3, training__max_new_tokens=4)
    report = train.run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    # Of at most three actions of four tokens; observations do not count.
    assert all(0 < step["completion_length"] <= 12 and 0 <= step["reward"] <= 3 for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)
    assert report["quality"]["after"]["n"] == 8
    again = evaluate.run(str(tmp_path / "run"), [config], terminal=terminal)
    assert again["greedy"] == report["quality"]["after"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluation__baseline": "measured"}, "only `midtune train`"),
        ({"training__fit": "24GB"}, "do not work yet"),
        ({"task__name": None, "training__algorithm": "gigpo"}, "no environment to play them in"),
    ],
)
def test_what_cannot_be_done_with_episodes_is_refused(
    configured: Configured, tmp_path: Path, terminal: Terminal, task: str, settings: Any, said: str
) -> None:
    given = {"task__name": task, "task__reward": None, **settings}
    if given["task__name"] is None:
        del given["task__name"], given["task__reward"]
    with pytest.raises(InputError, match=said):
        train.run(configured(**given), out=tmp_path / "run", resume=None, terminal=terminal)


def test_blocks_are_not_ranked_by_episodes(
    configured: Configured, tmp_path: Path, terminal: Terminal, task: str
) -> None:
    config = configured(task__name=task, task__reward=None)
    with pytest.raises(InputError, match="played in an environment"):
        probe.run(config, out=tmp_path / "ranking", resume=None, terminal=terminal)
