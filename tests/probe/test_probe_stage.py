from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from midtune.config import RunConfig, load_config
from midtune.errors import InputError, RunStopped
from midtune.probe.selection import matching_probe
from midtune.report.terminal import Terminal
from midtune.stages import probe
from midtune.stages.probe import run

REWARD = """
def length(completions, **columns):
    return [float(len(c[-1]["content"]) % 2) for c in completions]

def nothing(completions, **columns):
    return [0.0] * len(completions)
"""


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(Console(file=io.StringIO()))


@pytest.fixture
def configured(random_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows = [{"prompt": f"{i} and {i * i}", "answer": str(i + i * i)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text(REWARD)

    def make(**overrides: Any) -> RunConfig:
        settings = {
            "model.name": str(random_checkpoint("qwen3")),
            "model.device": "cpu",
            "task.name": str(tmp_path / "sums.jsonl"),
            "task.reward": f"{tmp_path / 'reward.py'}:length",
            "task.eval_size": 8,
            "training.max_new_tokens": 6,
            "training.prompts_per_step": 4,
            "evaluation.samples": 2,
            "probe.prompts": 16,
            "probe.trial_steps": 2,
        }
        nested: dict[str, dict[str, Any]] = {}
        for key, value in {**settings, **{k.replace("__", "."): v for k, v in overrides.items()}}.items():
            part, _, name = key.partition(".")
            nested.setdefault(part, {})[name] = value
        return RunConfig.model_validate(nested)

    return make


def test_gradient_probe_of_every_block(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(blocks__top_k=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()

    found = run(config, out=tmp_path / "run", terminal=terminal)

    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((tmp_path / "run" / "probe.json").read_text()) == found
    assert load_config(tmp_path / "run" / "config.yaml", {}) == config
    assert (tmp_path / "run" / "environment.json").is_file()
    rows = found["blocks"]
    assert [row["block"] for row in rows] == [0, 1, 2, 3]
    by_rank = sorted(rows, key=lambda row: row["rank"])
    assert [row["rank"] for row in by_rank] == [1, 2, 3, 4]
    assert [row["score"] for row in by_rank] == sorted((row["score"] for row in rows), reverse=True)
    assert found["selected"] == sorted(row["block"] for row in by_rank[:2])
    assert found["depth_baseline"] == {"block": 1, "score": rows[1]["score"]}
    assert rows[0].keys() == {
        *("block", "score", "low", "high", "contribution", "step_cost", "rank", "signal_share", "norm")
    }
    assert all(row["low"] <= row["score"] <= row["high"] and row["step_cost"] > 0 for row in rows)
    assert (found["schema"], found["method"], found["seed"]) == (1, "gradient", 0)
    assert found["settings"]["prompts"] == 16
    assert found["settings"]["passes"] == 8
    assert found["cost_seconds"] > 0
    assert matching_probe(found, config.model.name, found["task_fingerprint"], None)

    again = run(config, out=tmp_path / "again", terminal=terminal)
    assert [row["score"] for row in again["blocks"]] == [row["score"] for row in rows]


def test_the_middle_is_measured_but_not_ranked_when_other_layers_are_named(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    found = run(configured(probe__layers="2-3"), out=tmp_path / "run", terminal=terminal)
    assert [row["block"] for row in found["blocks"]] == [2, 3]
    assert found["selected"][0] in (2, 3)
    assert found["depth_baseline"]["block"] == 1


def test_trials_report_gains(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(probe__method="trial", probe__layers="1-2", training__lr=0.01)
    found = run(config, out=tmp_path / "run", terminal=terminal)
    assert [row["block"] for row in found["blocks"]] == [1, 2]
    assert (found["method"], found["settings"]["trial_steps"], found["settings"]["problems"]) == (
        "trial",
        2,
        8,
    )
    for row in found["blocks"]:
        assert -1 <= row["low"] <= row["score"] <= row["high"] <= 1
        assert row["step_cost"] > 0
    assert len(found["selected"]) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"probe__layers": "2-9"}, "layer 4 was asked for, but the model has 4 blocks, 0 to 3"),
        ({"probe__layers": "2", "blocks__top_k": 2}, "2 blocks were asked for, but only 1 were ranked"),
        ({"blocks__top_k": 5}, "5 blocks were asked for, but the model has 4"),
        ({"task__train_size": 3}, "compares at least 4 problems, but .* has 3 to train on"),
        ({"task__name": "reasoning-gym:no_such_task"}, "no_such_task"),
    ],
)
def test_wrong_input_leaves_nothing_behind(
    configured: Callable[..., RunConfig],
    tmp_path: Path,
    terminal: Terminal,
    overrides: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        run(configured(**overrides), out=tmp_path / "run", terminal=terminal)
    assert not (tmp_path / "run").exists()


def test_rewards_that_tell_nothing_apart(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(task__reward=f"{tmp_path / 'reward.py'}:nothing")
    with pytest.raises(RunStopped, match="all 64 completions got the reward 0"):
        run(config, out=tmp_path / "run", terminal=terminal)
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused_before_the_model_is_loaded(
    configured: Callable[..., RunConfig],
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    monkeypatch.setattr(probe, "open_source", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="is not empty"):
        run(configured(), out=tmp_path / "run", terminal=terminal)
