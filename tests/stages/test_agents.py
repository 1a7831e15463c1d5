"""Whole runs on tasks that are played in turns, and what cannot be done with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.report.terminal import Terminal
from midtune.stages import evaluate, probe, train
from midtune.stages.tasks import run as show_tasks
from tests.stages.conftest import Configured
from tests.tasks.toy_game import OWN

WALK = OWN.replace("if not action.isdigit():", "if False:").replace(
    "self.done = int(action) == self.number", "self.done = sum(map(ord, action)) % 3 == self.number"
)


@pytest.fixture
def walk(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "walk.py"
    path.write_text(WALK)
    return {
        "task__name": str(path),
        "task__reward": None,
        "task__eval_size": 4,
        "task__max_turns": 3,
        "task__turn_tokens": 3,
        "training__max_new_tokens": 80,
    }


def test_a_run_reports_episodes(
    configured: Configured, walk: dict[str, Any], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(**walk, training__algorithm="gigpo", training__prompts="auto")
    report = train.run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(1 <= line["turns"] <= 3 and line["shown_length"] >= 0 for line in lines)
    assert any(line["turns"] > 1 for line in lines)
    # Matches are met as they come.
    assert "prompts: uniform" in (tmp_path / "run/config.yaml").read_text()
    found = evaluate.run(str(tmp_path / "run"), [config], terminal=terminal)
    assert found["greedy"] == report["quality"]["after"]
    assert found["sampled"] == report["sampled"]["after"]


def test_what_knows_one_turn_only_says_so(
    configured: Configured, walk: dict[str, Any], tmp_path: Path, terminal: Terminal
) -> None:
    measured = configured(**walk, evaluation__baseline="measured")
    with pytest.raises(InputError, match=r"played in turns, and --baseline measured knows"):
        train.run(measured, out=tmp_path / "run", resume=None, terminal=terminal)
    with pytest.raises(InputError, match=r"samples itself; leave training.vllm out"):
        train.run(
            configured(**walk, training__vllm="http://127.0.0.1:1"),
            out=tmp_path / "run",
            resume=None,
            terminal=terminal,
        )
    with pytest.raises(InputError, match="gigpo compares turns, and .* is answered in one; use grpo"):
        train.run(
            configured(training__algorithm="gigpo"), out=tmp_path / "run", resume=None, terminal=terminal
        )


def test_a_check_begins_an_episode(configured: Configured, walk: dict[str, Any], terminal: Terminal) -> None:
    findings = show_tasks(configured(**walk), terminal, check=True)["findings"]
    assert findings[-1].endswith("begins as it did before")
    assert {"frozen-lake", "textworld"} <= set(show_tasks(None, terminal)["tasks"])


def test_what_an_episode_begins_with_is_shown(
    configured: Configured, walk: dict[str, Any], terminal: Terminal
) -> None:
    assert show_tasks(configured(**walk), terminal)["prompt"] == "Guess. It is below 3."


def test_blocks_are_ranked_by_episodes(
    configured: Configured, walk: dict[str, Any], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(
        **walk, training__steps=1, probe__method="sweep", probe__layers="1,2", model__quantize="none"
    )
    found = probe.run(config, out=tmp_path / "ranking", resume=None, terminal=terminal)
    assert {row["block"] for row in found["blocks"]} == {1, 2}
