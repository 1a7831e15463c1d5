"""What a race and a sweep of a small random model leave in probe.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.model.sizes import sizes_of
from midtune.probe.methods import check_probe, rank_blocks
from midtune.probe.selection import matching_probe
from midtune.probe.trials import Runner, Trial, Trials
from midtune.report.terminal import Terminal
from midtune.rollout.sampling import SamplingLimits
from midtune.rollout.text import TextSampler
from midtune.runs import RunFolder, unsealed
from tests.probe.toy_trials import toy_config, toy_task

Load = Callable[..., Policy]


def ranked(policy: Policy, folder: Path, blocks: list[int] | None = None, **settings: Any) -> dict[str, Any]:
    everything, task, config = list(range(policy.num_blocks)), toy_task(), toy_config(**settings)
    run_folder, terminal = RunFolder(folder), Terminal(quiet=True)
    runner = Runner(TextSampler(policy, SamplingLimits()), task, config, terminal)
    execute, problems = runner.in_turn(run_folder), len(runner.problems)
    trials = Trials(execute, config, policy.num_blocks, problems, run_folder, terminal)
    return rank_blocks(trials, policy.source, task, everything if blocks is None else blocks)


def records(folder: Path) -> list[Trial]:
    return [Trial(**unsealed(line)) for line in (folder / "trials.jsonl").read_bytes().splitlines()]


def test_a_race_stays_within_its_steps_and_says_who_may_be_best(load: Load, tmp_path: Path) -> None:
    policy = load("qwen3")
    torch.manual_seed(5)
    state = torch.get_rng_state()

    found = ranked(policy, tmp_path, probe__budget="10 steps")

    assert torch.equal(torch.get_rng_state(), state)
    assert not policy.trained
    assert (found["schema"], found["method"], found["seed"], found["seeds"]) == (1, "race", 0, 1)
    assert matching_probe(found, policy.source.name, "f", None)
    assert [row["block"] for row in found["blocks"]] == [0, 1, 2, 3]
    rows = sorted(found["blocks"], key=lambda row: row["rank"])
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
    assert found["depth_baseline"] == {"block": 1, "score": found["blocks"][1]["score"]}
    # No held-out problem was looked at, and none of those that were was trained on.
    base = records(tmp_path)[0]
    assert (base.trained, len(base.sampled or [])) == ("base", 8)
    assert not (tmp_path / "trials").exists()


def test_a_race_of_seconds_ends(load: Load, tmp_path: Path) -> None:
    found = ranked(load("qwen3"), tmp_path, [1, 2, 3], probe__budget="3s")
    assert len(found["blocks"]) == 3
    assert found["cost_seconds"] == pytest.approx(
        sum(trial.train_s + trial.score_s for trial in records(tmp_path))
    )


def test_the_middle_is_measured_but_not_ranked_when_other_layers_are_named(
    load: Load, tmp_path: Path
) -> None:
    found = ranked(load("qwen3"), tmp_path, [2, 3], probe__budget="3 steps", training__steps=1)
    assert [row["block"] for row in found["blocks"]] == [2, 3]
    assert found["selected"][0] in (2, 3)
    assert found["depth_baseline"]["block"] == 1


def test_a_sweep_measures_contributions_beside_full_training(load: Load, tmp_path: Path) -> None:
    found = ranked(
        load("qwen3", "none"),
        tmp_path,
        [1, 2],
        probe__method="sweep",
        probe__seeds=2,
        model__quantize="none",
        training__steps=3,
        probe__full_lr=0.001,
    )
    assert [(trial.trained, trial.seed, trial.steps) for trial in records(tmp_path)] == [
        ("base", 0, 0),
        *[(trained, seed, 3) for seed in (0, 1) for trained in ("full", 1, 2)],
    ]
    assert [row["block"] for row in found["blocks"]] == [1, 2]
    assert found["seeds"] == 2
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
    assert (found["settings"]["full_lr"], found["settings"]["steps"]) == (0.001, 3)
    assert found["base"]["sampled"]["n"] == 8


@pytest.mark.parametrize(
    ("blocks", "train", "top_k", "message"),
    [
        ([2], 24, 2, "2 blocks were asked for, but only 1 were ranked"),
        ([0, 1, 2, 3], 24, 5, "5 blocks were asked for, but the model has 4"),
        (
            [0, 1, 2, 3],
            5,
            1,
            "a race trains on some problems and scores on others, but sums has 5 to train on",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    load: Load, tmp_path: Path, blocks: list[int], train: int, top_k: int, message: str
) -> None:
    config = toy_config(blocks__top_k=top_k)
    with pytest.raises(InputError, match=message):
        check_probe(
            sizes_of(load("qwen3").model.config), toy_task(train=train), config, blocks, RunFolder(tmp_path)
        )
