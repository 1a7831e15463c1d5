"""A run, its base and a model scored on one task and on several."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midtune.config import load_config, with_settings
from midtune.errors import InputError
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import Evaluation
from midtune.stages import evaluate


def test_kinds_of_scores_by_hand() -> None:
    # One problem has 1 of 4 samples correct, one none; a partial reward counts for the mean alone.
    samples = np.array([[1, 0, 0.5, 0], [0, 0, 0, 0]])
    found = evaluate.scores_by_kind(
        Evaluation(np.array([1.0, 0.0]), samples.mean(axis=1), ["a", "b"], samples), [1, 2]
    )
    assert {kind: scores.tolist() for kind, scores in found.items()} == {
        "greedy": [1, 0],
        "avg@4": [0.375, 0],
        "pass@1": [0.25, 0],
        "pass@2": [0.5, 0],
    }


def test_a_run_is_scored_beside_its_base_on_several_tasks(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, terminal: Terminal
) -> None:
    folder, report = finished
    own = with_settings(load_config(folder / "config.yaml", {}), {"evaluation.k": [1, 2]})
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(40)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = with_settings(own, {"task.name": str(tmp_path / "other.jsonl")})
    results = tmp_path / "problems.jsonl"
    found = evaluate.run(str(folder), [own, other], results=results, terminal=terminal)

    first, second = found["tasks"]
    assert (found["patch"], found["greedy"], found["sampled"]) == (
        [2],
        first["scores"]["greedy"],
        first["scores"]["avg@2"],
    )
    # The run scored the same problems with the same random numbers.
    assert first["before"]["greedy"] == report["quality"]["before"]
    assert first["scores"]["greedy"] == report["quality"]["after"]
    assert first["gain"]["greedy"] == report["quality"]["gain"]
    assert first["gain"]["avg@2"] == report["sampled"]["gain"]
    assert [row["task"] for row in (first, second)] == [own.task.name, other.task.name]
    assert second["scores"].keys() == {"greedy", "avg@2", "pass@1", "pass@2"}
    expected = [row["task"] for row in (first, second) if any(g["high"] < 0 for g in row["gain"].values())]
    assert found["worse"] == expected

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["arm"], line["task"]) for line in lines] == [
        (arm, task.task.name) for arm in ("before", "after") for task in (own, other) for _ in range(8)
    ]
    after = [line for line in lines if line["arm"] == "after" and line["task"] == own.task.name]
    assert np.mean([line["greedy"] for line in after]) == pytest.approx(first["scores"]["greedy"]["score"])
    assert np.mean([line["sampled"] for line in after]) == pytest.approx(first["scores"]["avg@2"]["score"])
    assert np.mean([line["correct"] for line in after]) / 2 == pytest.approx(
        first["scores"]["pass@1"]["score"]
    )
    assert {"question", "answer", "completion"} <= lines[0].keys()


def test_a_model_has_no_base_beside_it(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, terminal: Terminal
) -> None:
    folder, report = finished
    config = load_config(folder / "config.yaml", {})
    found = evaluate.run(config.model.name, [config], terminal=terminal)
    assert (found["patch"], found["worse"], found["tasks"][0]["before"]) == (None, None, None)
    assert found["greedy"] == report["quality"]["before"]
    with pytest.raises(InputError, match="is no folder"):
        evaluate.run(config.model.name, [config], results=tmp_path / "no/file", terminal=terminal)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_a_missing_harness_is_named_with_its_command(
    finished: tuple[Path, dict[str, Any]], terminal: Terminal
) -> None:
    config = load_config(finished[0] / "config.yaml", {})
    with pytest.raises(InputError, match=r"pip install 'midtune\[lm-eval\]'"):
        evaluate.run(config.model.name, [config], lm_eval=["arc_easy"], terminal=terminal)
