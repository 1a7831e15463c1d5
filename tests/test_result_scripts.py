"""The scripts of recipes/results that train: spans of blocks, and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from midtune.report.terminal import Terminal
from tests.scripts import read_script

RECIPE = """
model: {name: tiny, quantize: none}
task: {name: "reasoning-gym:chain_sum", args: {min_terms: 2, max_terms: 2}, eval_size: 8}
training: {steps: 2, prompts_per_step: 2, beta: 0, max_new_tokens: 8, stop_after_equal_rewards: 0}
evaluation: {samples: 1}
probe: {method: sweep, full_lr: 1.0e-3}
"""


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(quiet=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_spans_are_trained_beside_all_parameters_and_recorded(
    recipe: Path, tmp_path: Path, terminal: Terminal
) -> None:
    measure, records = read_script("spans/spans").measure, tmp_path / "records"
    found = measure(recipe, ["5", "4-6"], 1, records, terminal)
    full, one, three = found["arms"]
    assert [arm["blocks"] for arm in found["arms"]] == ["full", "5", "4-6"]
    assert full["contribution"] is None
    assert three["parameters"] == 3 * one["parameters"] < full["parameters"]
    assert one["by_seed"] == [pytest.approx(one["sampled"]["value"])]
    # Recorded runs are not run again, and a further seed goes on from them.
    lines = (records / "trials.jsonl").read_text().splitlines()
    assert measure(recipe, ["5", "4-6"], 1, records, terminal) == found
    assert len(measure(recipe, ["5"], 2, records, terminal)["arms"][1]["by_seed"]) == 2
    assert (records / "trials.jsonl").read_text().splitlines()[: len(lines)] == lines


@pytest.mark.parametrize("how", ["uniform", "auto"])
def test_prompts_are_measured_by_scores_and_steps(how: str, recipe: Path, terminal: Terminal) -> None:
    found = read_script("prompts/prompts").measure(recipe, {"training.prompts": how}, 1, terminal)
    assert (found["prompts"], found["seed"], found["block"]) == (how, 0, 5)
    assert [point["step"] for point in found["points"]] == [0, 1, 2]
    assert len(found["equal_groups"]) == len(found["step_s"]) == 2
    assert found["points"][-1]["seconds"] == pytest.approx(sum(found["step_s"]), abs=1e-3)
