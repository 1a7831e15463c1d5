from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midtune.config import RunConfig, load_config, with_settings
from midtune.model.cache import cache_folder
from midtune.model.policy import Policy
from midtune.report.terminal import Terminal
from midtune.rl import scoring
from midtune.rl.scoring import score_rows
from midtune.rollout.evaluation import Evaluation
from midtune.rollout.sampling import SamplingLimits
from midtune.rollout.text import TextSampler
from midtune.runs import sealed
from midtune.tasks import Task, load_task

SETTINGS = {"task.eval_size": 5, "training.max_new_tokens": 4, "evaluation.samples": 2, "task.train_size": 9}


@pytest.fixture
def config() -> RunConfig:
    return load_config(None, {**SETTINGS, "model.device": "cpu"})


@pytest.fixture
def task(config: RunConfig) -> Task:
    return load_task(str(config.task.name), config.task, config.seed)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "cache"))


def scored(policy: Policy, task: Task, config: RunConfig, **how: Any) -> Evaluation:
    sampler = TextSampler(policy, SamplingLimits())
    how = {"of_base": True, **how}
    return score_rows(sampler, task.held_out, task, config, "", Terminal(quiet=True).progress, **how)


def kept() -> list[Path]:
    return [*cache_folder("scores").glob("*")]


def test_scores_of_a_base_are_kept(load: Callable[..., Policy], task: Task, config: RunConfig) -> None:
    first = scored(load(), task, config)
    again = scored(load(), task, config)
    assert (first.kept, again.kept, len(kept())) == (False, True, 1)
    assert again.completions == first.completions
    for name in ("greedy", "sampled", "samples"):
        assert np.array_equal(getattr(again, name), getattr(first, name))
    assert not scored(load(), task, config, of_base=False).kept
    # A greedy score is another question, with no samples.
    assert scored(load(), task, config, samples=0).sampled is None
    assert scored(load(), task, config, samples=0).kept


def test_all_that_decides_a_score_counts(
    load: Callable[..., Policy],
    random_checkpoint: Callable[..., Path],
    task: Task,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load()
    scored(policy, task, config)
    assert not scored(load(quantize="none"), task, config).kept
    assert not scored(load("llama"), task, config).kept
    for key, value in {
        "seed": 1,
        "training.temperature": 0.5,
        "model.unpack": "never",
        "sandbox.cpu_s": 9,
    }.items():
        assert not scored(policy, task, with_settings(config, {key: value})).kept, key
    assert not scored(policy, replace(task, fingerprint="of another reward"), config).kept
    assert not scored(policy, replace(task, held_out=task.held_out[1:]), config).kept
    file = next(random_checkpoint("qwen3").glob("generation_config.json"))
    text = file.read_text()
    file.write_text(text + "\n")
    assert not scored(policy, task, config).kept
    file.write_text(text)
    assert scored(policy, task, config).kept
    monkeypatch.setattr(scoring, "_code", lambda: ["another version"])
    assert not scored(policy, task, config).kept


def test_what_a_persons_own_code_decides_is_not_kept(
    load: Callable[..., Policy], task: Task, config: RunConfig
) -> None:
    scored(load(), replace(task, own_reward=True), config)
    assert kept() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b'"greedy": [', b'"greedy": [1.0, '),
        lambda content: b"[]",
        lambda content: json.dumps(sealed({"greedy": [0.0]})).encode(),
        # Of another shape, though its digest is right.
        lambda content: json.dumps(sealed({"greedy": [0.0], "completions": ["a"], "samples": None})).encode(),
        lambda content: json.dumps(sealed({"greedy": "?", "completions": 5, "samples": {}})).encode(),
    ],
)
def test_damaged_scores_are_computed_again(
    damage: Callable[[bytes], bytes], load: Callable[..., Policy], task: Task, config: RunConfig
) -> None:
    policy = load()
    first = scored(policy, task, config)
    (file,) = kept()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = scored(policy, task, config)
    assert not again.kept
    assert np.array_equal(again.greedy, first.greedy)
    assert file.read_bytes() == whole


def test_without_a_cache_nothing_is_lost(
    load: Callable[..., Policy],
    task: Task,
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "file"))
    assert len(scored(load(), task, config).greedy) == 5
