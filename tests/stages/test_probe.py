from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midtune.config import load_config
from midtune.errors import InputError, Interrupted
from midtune.report.terminal import Terminal
from midtune.runs import unsealed
from midtune.stages.probe import run
from tests.stages.conftest import Configured

# Asks for an end as soon as three trials are recorded, once.
STOPPING = """
import os
import signal
from pathlib import Path

FOLDER = Path(__file__).parent

def stopping(completions, **columns):
    records = FOLDER / "run/trials.jsonl"
    if records.is_file() and records.read_text().count("\\n") == 3 and not (FOLDER / "stopped").exists():
        (FOLDER / "stopped").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(c[-1]["content"]) % 2) for c in completions]
"""
SWEEP = {"probe__method": "sweep", "probe__layers": "0-2", "model__quantize": "none", "training__steps": 2}
RACE = {"probe__budget": "5 steps", "probe__layers": "0-2", "model__quantize": "none", "training__steps": 2}


@pytest.mark.parametrize("settings", [SWEEP, RACE], ids=["sweep", "race"])
def test_a_probe_that_was_stopped_goes_on_as_it_would_have(
    configured: Configured, tmp_path: Path, terminal: Terminal, settings: dict[str, Any]
) -> None:
    (tmp_path / "stopping.py").write_text(STOPPING)
    config = configured(task__reward=f"{tmp_path / 'stopping.py'}:stopping", **settings)
    whole = run(config, out=tmp_path / "whole", resume=None, terminal=terminal)
    with pytest.raises(Interrupted, match="midtune probe --resume .*run"):
        run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    records = tmp_path / "run/trials.jsonl"
    before = records.read_text()
    assert not (tmp_path / "run/probe.json").exists()
    with records.open("a") as file:
        file.write('{"trained": 3, "se')

    again = load_config(tmp_path / "run/config.yaml", {})
    found = run(again, out=None, resume=tmp_path / "run", terminal=terminal)

    assert records.read_text().startswith(before)
    assert again == config
    kept = ("block", "score", "steps", "rank", "best_probability", "among_best")
    rows = [[[row[key] for key in kept] for row in probe["blocks"]] for probe in (found, whole)]
    assert rows[0] == rows[1]
    lines = [
        [(line["trained"], line["steps"]) for line in map(json.loads, file.read_text().splitlines())]
        for file in (records, tmp_path / "whole/trials.jsonl")
    ]
    assert lines[0] == lines[1]
    assert unsealed((tmp_path / "run/probe.json").read_bytes()) == found
    assert {file.name for file in (tmp_path / "run").iterdir()} >= {"environment.json", "probe.svg"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe__layers": "2-9"}, "layer 4 was asked for, but the model has 4 blocks, 0 to 3"),
        ({"probe__layers": ""}, "layers `` cannot be read"),
        ({"probe__layers": "2", "blocks__top_k": 2}, "2 blocks were asked for, but only 1 were ranked"),
        ({"task__name": "reasoning-gym:no_such_task"}, "no_such_task"),
        ({"probe__method": "sweep"}, "a sweep compares .* add --quantize none"),
        ({"task__train_size": 3, "task__eval_size": 2}, "a race trains on some problems"),
    ],
)
def test_wrong_input_leaves_nothing_behind(
    configured: Configured, tmp_path: Path, terminal: Terminal, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(configured(**settings), out=tmp_path / "run", resume=None, terminal=terminal)
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused_before_the_model_is_looked_for(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    config = configured(model__name=str(tmp_path / "no_model"))
    with pytest.raises(InputError, match="is not empty"):
        run(config, out=tmp_path / "run", resume=None, terminal=terminal)


def test_a_folder_of_a_training_run_is_refused(
    configured: Configured, finished: tuple[Path, Any], terminal: Terminal
) -> None:
    with pytest.raises(InputError, match="was made by `midtune train`, .* `midtune train --resume"):
        run(configured(), out=None, resume=finished[0], terminal=terminal)
