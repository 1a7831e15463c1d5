"""Trials are recorded, continued and repeated exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midtune.model.policy import Policy
from midtune.rollout.sampling import Rollout, SamplingLimits
from midtune.rollout.text import TextSampler
from tests.probe.toy_trials import length, toy_task, toy_trials

Load = Callable[..., Policy]


def test_a_trial_is_scored_anew_on_more_problems_without_training_again(load: Load, tmp_path: Path) -> None:
    trials = toy_trials(load("qwen3"), tmp_path, problems=40)
    (few,), (all_of_them,) = (trials.run([trials.key(1, 1, share=share)]) for share in (0, 1))
    assert (len(few.greedy), len(all_of_them.greedy)) == (32, 40)
    assert few.greedy == all_of_them.greedy[:32]
    assert few.train_s > 0 and all_of_them.train_s == 0
    assert few.step_s == all_of_them.step_s > 0
    assert (trials.spent_steps, len(trials.done)) == (1, 2)
    # Seconds of 72 scores, for 40.
    assert trials.seconds_per_score == pytest.approx((few.score_s + all_of_them.score_s) / 72 * 40)
    trials.forget()
    assert [file.name for file in tmp_path.iterdir()] == ["trials.jsonl"]


def test_what_a_trial_ends_with_does_not_depend_on_where_it_paused(load: Load, tmp_path: Path) -> None:
    policy = load("qwen3")
    paused, straight = toy_trials(policy, tmp_path / "paused"), toy_trials(policy, tmp_path / "straight")
    (first,) = paused.run([paused.key(1, 1)])
    assert first.steps == 1
    ends = [trials.run([trials.key(1, 3)])[0] for trials in (paused, straight)]
    assert ends[0].sampled == ends[1].sampled
    assert paused.spent_steps == straight.spent_steps == 3
    assert not policy.trained


def test_a_trial_that_was_stopped_is_run_again_and_those_before_it_are_known(
    load: Load, tmp_path: Path
) -> None:
    calls: list[int] = []

    def stopping(completions: list[Any], **columns: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return length(completions)

    policy = load("qwen3")
    whole = toy_trials(policy, tmp_path / "whole")
    keys = [whole.key("base"), whole.key(1, 2), whole.key(2, 2)]
    expected = whole.run(keys)
    stopped = toy_trials(policy, tmp_path / "run", task=toy_task(reward=stopping))
    with pytest.raises(KeyboardInterrupt):
        stopped.run(keys)
    assert not policy.trained
    # As a crash while it was being written leaves it.
    with (tmp_path / "run/trials.jsonl").open("a") as file:
        file.write('{"trained": 3, "se')

    resumed = toy_trials(policy, tmp_path / "run", task=toy_task(reward=stopping))
    before = len(calls)
    assert (resumed.spent_s, resumed.spent_steps) == (0, 0)
    assert resumed.run(keys[:2]) == list(stopped.done.values())
    assert len(calls) == before
    found = resumed.run(keys)
    assert [trial.sampled for trial in found] == [trial.sampled for trial in expected]
    assert resumed.spent_steps == 4
    assert len((tmp_path / "run/trials.jsonl").read_text().splitlines()) == 3


class Counting(TextSampler):
    """Remembers which blocks were trained when training, not scoring, sampled."""

    def sample(self, *args: Any, boundary_block: int | None = None, **kwargs: Any) -> Rollout:
        if boundary_block is not None:
            sampled.append(self.policy.trained)
        return super().sample(*args, boundary_block=boundary_block, **kwargs)


sampled: list[list[int]] = []


def test_runs_that_begin_alike_share_their_first_rollout(load: Load, tmp_path: Path) -> None:
    policy = load("qwen3", "none")
    sampled.clear()
    trials = toy_trials(policy, tmp_path / "shared", sampler=Counting(policy, SamplingLimits()))
    shared = trials.run([trials.key(trained, 2) for trained in ("full", 1, 2)])
    assert sampled == [[0, 1, 2, 3], [0, 1, 2, 3], [1], [2]]
    alone = [toy_trials(policy, tmp_path / f"{k}").run([trials.key(k, 2)])[0] for k in (1, 2)]
    assert [trial.sampled for trial in shared[1:]] == [trial.sampled for trial in alone]
