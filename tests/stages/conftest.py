"""A small run, configured as the command line would."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.config import RunConfig, load_config
from midtune.report.terminal import Terminal
from midtune.stages import train

REWARD = """
def digits(completions, **columns):
    texts = [c[-1]["content"] for c in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]

def nothing(completions, **columns):
    return [0.0] * len(completions)

def broken(completions, **columns):
    raise ValueError("no such thing")

def short(completions, **columns):
    return [0.0]

def words(completions, **columns):
    return ["good"] * len(completions)
"""


Configured = Callable[..., RunConfig]


def small_run(checkpoint: Path, folder: Path, **settings: Any) -> RunConfig:
    """The configuration of a run of seconds on problems and rewards that are written to `folder`."""
    rows = [{"prompt": f"{i} and {i * i}", "answer": str(i + i * i)} for i in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)
    small = {
        "model.name": str(checkpoint),
        "model.device": "cpu",
        "task.name": str(folder / "sums.jsonl"),
        "task.reward": f"{folder / 'reward.py'}:digits",
        "task.eval_size": 8,
        "blocks.layers": "2",
        "training.steps": 3,
        "training.lr": 1e-2,
        "training.beta": 0.0,
        "training.max_new_tokens": 6,
        "training.prompts_per_step": 2,
        "evaluation.samples": 2,
    }
    return load_config(None, {**small, **{k.replace("__", "."): v for k, v in settings.items()}})


@pytest.fixture
def terminal() -> Terminal:
    """What would be shown is in `terminal.console.file`."""
    return Terminal(Console(file=io.StringIO(), width=200))


@pytest.fixture
def configured(random_checkpoint: Callable[..., Path], tmp_path: Path, traced_once: None) -> Configured:
    """A function: settings (`training__steps=3`) → the configuration of a small run in `tmp_path`."""
    return partial(small_run, random_checkpoint("qwen3"), tmp_path)


@pytest.fixture(scope="session")
def finished(
    random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, traced_once: None
) -> tuple[Path, dict[str, Any]]:
    """A run folder and its report, made once."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_run(random_checkpoint("qwen3"), folder)
    report = train.run(config, out=folder / "run", resume=None, terminal=Terminal(quiet=True))
    return folder / "run", report
