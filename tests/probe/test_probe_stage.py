from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from midtune.config import RunConfig, load_config
from midtune.errors import InputError, Interrupted, RunStopped
from midtune.probe import trials
from midtune.probe.selection import matching_probe
from midtune.report.terminal import Terminal
from midtune.rl import trainer
from midtune.runs import unsealed
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
            "probe.method": "gradient",
            "training.steps": 4,
            "training.beta": 0.0,
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

    found = run(config, out=tmp_path / "run", resume=None, terminal=terminal)

    assert torch.equal(torch.get_rng_state(), state)
    assert unsealed((tmp_path / "run" / "probe.json").read_bytes()) == found
    assert load_config(tmp_path / "run" / "config.yaml", {}) == config
    assert (tmp_path / "run" / "environment.json").is_file()
    rows = found["blocks"]
    assert [row["block"] for row in rows] == [0, 1, 2, 3]
    # By position: gradients are measured, but they do not rank.
    assert [row["rank"] for row in rows] == [3, 1, 2, 4]
    assert found["selected"] == [1, 2]
    assert "closeness to the middle" in found["note"]
    assert found["depth_baseline"] == {"block": 1, "score": rows[1]["score"]}
    assert rows[0].keys() == {
        *("block", "score", "low", "high", "contribution", "step_cost", "rank", "signals")
    }
    assert all(row["low"] <= row["score"] <= row["high"] and row["step_cost"] > 0 for row in rows)
    assert (found["schema"], found["method"], found["seed"]) == (1, "gradient", 0)
    assert found["settings"]["prompts"] == 16
    assert found["settings"]["passes"] == 8
    assert found["cost_seconds"] > 0
    assert matching_probe(found, config.model.name, found["task_fingerprint"], None)

    again = run(config, out=tmp_path / "again", resume=None, terminal=terminal)
    assert [row["score"] for row in again["blocks"]] == [row["score"] for row in rows]


def test_the_middle_is_measured_but_not_ranked_when_other_layers_are_named(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    found = run(configured(probe__layers="2-3"), out=tmp_path / "run", resume=None, terminal=terminal)
    assert [row["block"] for row in found["blocks"]] == [2, 3]
    assert found["selected"][0] in (2, 3)
    assert found["depth_baseline"]["block"] == 1


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_a_race_stays_within_its_steps_and_says_who_may_be_best(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(probe__method="race", probe__budget="10 steps", training__lr=0.01)
    found = run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    rows = sorted(found["blocks"], key=lambda row: row["rank"])
    assert sorted(row["block"] for row in rows) == [0, 1, 2, 3]
    # 5 for four blocks in the first round of two, and what is left for two in the second.
    assert [row["steps"] for row in rows] == [4, 4, 1, 1]
    assert found["cost_steps"] == 10
    assert sum(row["best_probability"] for row in rows) == pytest.approx(1)
    assert rows[0]["among_best"] and found["selected"] == [rows[0]["block"]]
    for row in rows:
        assert row["low"] <= row["score"] <= row["high"]
        assert row["step_cost"] > 0
        assert row["gain_per_second"] == pytest.approx(row["score"] / row["step_cost"] / row["steps"])
        assert row["contribution"] is None
    # No held-out problem was looked at, and none of those that were was trained on.
    base = records(tmp_path / "run")[0]
    assert (base["trained"], len(base["sampled"])) == ("base", 8)
    assert not (tmp_path / "run" / "trials").exists()


def test_a_race_of_seconds_ends(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(probe__method="race", probe__budget="3s", probe__layers="1-3")
    found = run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    assert len(found["blocks"]) == 3
    assert found["cost_seconds"] == pytest.approx(
        sum(record["train_s"] + record["score_s"] for record in records(tmp_path / "run"))
    )


def test_the_first_trial_is_scored_anew_where_the_others_have_more_problems(
    configured: Callable[..., RunConfig],
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "FEWEST_PROBLEMS", 2)
    config = configured(probe__method="race", probe__budget="1h", training__steps=2)
    found = run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    assert [(row["steps"], row["problems"]) for row in found["blocks"]] == [(2, 8)] * 4
    assert len(records(tmp_path / "run")) == 1 + 1 + 4


def test_what_a_trial_ends_with_does_not_depend_on_where_it_paused(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    found = {}
    for name, budget in (("paused", "6 steps"), ("straight", "100 steps")):
        config = configured(
            probe__method="race", probe__layers="1-2", probe__budget=budget, training__steps=3
        )
        run(config, out=tmp_path / name, resume=None, terminal=terminal)
        found[name] = {
            record["trained"]: record for record in records(tmp_path / name) if record["steps"] == 3
        }
    for block in (1, 2):
        assert found["paused"][block]["sampled"] == found["straight"][block]["sampled"]


def test_a_sweep_measures_contributions_beside_full_training(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(
        probe__method="sweep",
        probe__layers="1-2",
        probe__seeds=2,
        model__quantize="none",
        training__steps=3,
        training__lr=0.01,
        probe__full_lr=0.001,
    )
    found = run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    assert [(r["trained"], r["seed"], r["steps"]) for r in records(tmp_path / "run")] == [
        ("base", 0, 0),
        *[(trained, seed, 3) for seed in (0, 1) for trained in ("full", 1, 2)],
    ]
    assert [row["block"] for row in found["blocks"]] == [1, 2]
    full = found["full"]
    assert full["low"] <= full["score"] <= full["high"]
    for row in found["blocks"]:
        defined = full["low"] > 0
        assert (row["contribution"] is not None) == defined
        if defined:
            assert row["contribution"] == pytest.approx(row["score"] / full["score"])
        assert row["greedy"].keys() >= {"score", "low", "high", "contribution"}
    assert ("note" in found) == (full["low"] <= 0)
    assert {found["plateau"]["first"], found["plateau"]["last"]} <= {1, 2}
    assert found["settings"]["full_lr"] == 0.001
    assert found["base"]["sampled"]["n"] == 8


def test_a_sweep_that_was_stopped_goes_on_after_its_last_trial(
    configured: Callable[..., RunConfig],
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(probe__method="sweep", probe__layers="0-2", model__quantize="none", training__steps=2)
    whole = run(config, out=tmp_path / "whole", resume=None, terminal=terminal)
    train_blocks, started = trials.train_blocks, []

    def stopping(policy: Any, *args: Any, **kwargs: Any) -> int:
        started.append(policy.trained)
        if len(started) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_blocks(policy, *args, **kwargs)

    monkeypatch.setattr(trials, "train_blocks", stopping)
    with pytest.raises(Interrupted, match="midtune probe --resume .*run"):
        run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    assert [record["trained"] for record in records(tmp_path / "run")] == ["base", "full", 0]
    assert not (tmp_path / "run/probe.json").exists()
    again = load_config(tmp_path / "run/config.yaml", {})
    found = run(again, out=None, resume=tmp_path / "run", terminal=terminal)
    assert started[2:] == [[1], [1], [2]]
    scores = [[row["score"] for row in probe["blocks"]] for probe in (found, whole)]
    assert scores[0] == scores[1]


def test_a_race_that_was_stopped_goes_on_as_it_would_have(
    configured: Callable[..., RunConfig],
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(probe__method="race", probe__budget="10 steps", training__lr=0.01)
    whole = run(config, out=tmp_path / "whole", resume=None, terminal=terminal)
    train_blocks, started = trials.train_blocks, []

    def stopping(policy: Any, *args: Any, **kwargs: Any) -> int:
        started.append(policy.trained)
        if len(started) == 6:
            raise KeyboardInterrupt
        return train_blocks(policy, *args, **kwargs)

    monkeypatch.setattr(trials, "train_blocks", stopping)
    with pytest.raises(Interrupted):
        run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    # As a crash while it was being written leaves it.
    with (tmp_path / "run/trials.jsonl").open("a") as file:
        file.write('{"trained": 3, "se')
    found = run(config, out=None, resume=tmp_path / "run", terminal=terminal)
    assert len(started) == 7
    kept = ("block", "score", "steps", "rank", "best_probability", "among_best")
    rows = [[[row[key] for key in kept] for row in probe["blocks"]] for probe in (found, whole)]
    assert rows[0] == rows[1]


def test_runs_that_begin_alike_share_their_first_rollout(
    configured: Callable[..., RunConfig],
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(probe__method="sweep", probe__layers="1-2", model__quantize="none", training__steps=2)
    sampled: list[list[int]] = []
    sample = trainer.sample

    def counting(policy: Any, *args: Any, **kwargs: Any) -> Any:
        sampled.append(policy.trained)
        return sample(policy, *args, **kwargs)

    monkeypatch.setattr(trainer, "sample", counting)
    run(config, out=tmp_path / "shared", resume=None, terminal=terminal)
    assert sampled == [[0, 1, 2, 3], [0, 1, 2, 3], [1], [2]]
    monkeypatch.setattr(trials, "FirstRollout", lambda: None)
    run(config, out=tmp_path / "alone", resume=None, terminal=terminal)
    shared, alone = records(tmp_path / "shared"), records(tmp_path / "alone")
    assert [record["sampled"] for record in shared] == [record["sampled"] for record in alone]


def test_the_price_can_decide(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(probe__method="race", probe__budget="100 steps", probe__objective="gain-per-second")
    found = run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    rows = sorted(found["blocks"], key=lambda row: row["rank"])
    far = [row["score"] / row["step_cost"] for row in rows if row["steps"] == rows[0]["steps"]]
    assert far == sorted(far, reverse=True)
    assert found["selected"] == [rows[0]["block"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"probe__layers": "2-9"}, "layer 4 was asked for, but the model has 4 blocks, 0 to 3"),
        ({"probe__layers": "2", "blocks__top_k": 2}, "2 blocks were asked for, but only 1 were ranked"),
        ({"blocks__top_k": 5}, "5 blocks were asked for, but the model has 4"),
        ({"task__train_size": 3}, "compares at least 4 problems, but .* has 3 to train on"),
        ({"task__name": "reasoning-gym:no_such_task"}, "no_such_task"),
        ({"probe__method": "sweep"}, "a sweep compares .* add --quantize none"),
        ({"probe__method": "race", "task__train_size": 4}, "a race trains on some problems"),
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
        run(configured(**overrides), out=tmp_path / "run", resume=None, terminal=terminal)
    assert not (tmp_path / "run").exists()


def test_rewards_that_tell_nothing_apart(
    configured: Callable[..., RunConfig], tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(task__reward=f"{tmp_path / 'reward.py'}:nothing")
    with pytest.raises(RunStopped, match="all 64 completions got the reward 0"):
        run(config, out=tmp_path / "run", resume=None, terminal=terminal)
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
        run(configured(), out=tmp_path / "run", resume=None, terminal=terminal)
