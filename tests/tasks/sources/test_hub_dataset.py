"""Datasets of the hub, from its cache and where nobody can reach it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from midtune import network
from midtune.errors import InputError
from midtune.network import HUB_OFFLINE, OFFLINE
from midtune.tasks.sources import hub_dataset
from tests.tasks.toy_data import SPLITS, load, write


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("openai/gsm8k", True),
        ("openai/gsm8k:main", True),
        ("AI-MO/NuminaMath-1.5", True),
        ("data/train.jsonl", False),
        ("tasks/mine.py", False),
        ("reasoning-gym:gcd", False),
        ("a/b/c", False),
    ],
)
def test_hub_datasets_are_told_by_their_names(name: str, is_one: bool) -> None:
    assert hub_dataset.is_dataset(name) == is_one


def test_a_hub_dataset_gives_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration, datasets.config.HF_HUB_OFFLINE))
        return datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part, rows in SPLITS.items()})

    monkeypatch.setenv(HUB_OFFLINE, "0")
    monkeypatch.setattr(hub_dataset, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    task = load("openai/gsm8k:main")
    assert asked == [("openai/gsm8k", "main", False)]
    assert (len(task.train), len(task.held_out)) == (8, 3)
    assert {row["question"] for row in task.held_out} < {row["question"] for row in SPLITS["test"]}


def test_what_is_cached_is_read_offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFFLINE, "1")
    with pytest.raises(
        InputError, match="nor in the cache of this machine, and work is offline; go online once"
    ):
        load("openai/gsm8k:main")
    data = {part: str(write(tmp_path / f"{part}.jsonl", rows)) for part, rows in SPLITS.items()}
    made = datasets.load_dataset("json", "main", data_files=data, cache_dir=str(tmp_path / "made"))
    folder = Path(made["train"].cache_files[0]["filename"]).parent
    cached = cache / "openai___gsm8k/main/0.0.0/hash"
    cached.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(cached / path.name.replace("json-", "gsm8k-"))
    task = load("openai/gsm8k:main")
    assert {row["question"] for row in task.train} == {row["question"] for row in SPLITS["train"]}
    assert {row["question"] for row in task.held_out} < {row["question"] for row in SPLITS["test"]}
    with pytest.raises(InputError, match="openai/gsm8k:socratic is neither a file or folder here nor in the"):
        load("openai/gsm8k:socratic")


def test_a_hub_that_cannot_be_reached_takes_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HUB_OFFLINE, "0")
    monkeypatch.setattr(network, "REACH_TIMEOUT_S", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    started = time.perf_counter()
    with pytest.raises(InputError, match="and the hub cannot be reached"):
        load("openai/gsm8k:main")
    assert time.perf_counter() - started < 2.5
