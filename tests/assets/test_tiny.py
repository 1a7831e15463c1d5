from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from midtune.config import BUNDLED_RECIPE, load_config
from midtune.model.loading import load_policy
from midtune.model.sources import resolve
from midtune.report.terminal import Terminal
from midtune.stages.opening import Opened
from recipes.tiny import make_tiny

FOLDER = BUNDLED_RECIPE.parent


def test_it_is_what_it_says() -> None:
    policy = load_policy(resolve("tiny"), device="cpu")
    assert type(policy.model).__name__ == "Qwen3ForCausalLM"
    assert policy.num_blocks == 12
    assert 1.5e6 < policy.total_parameters < 2.5e6
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 6 * 2**20
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "float16"


def test_its_recipe_asks_for_what_it_was_trained_on() -> None:
    assert load_config(None, {}).task.args == make_tiny.TASK


def test_it_solves_a_third_to_a_half_of_its_problems() -> None:
    config = load_config(None, {"task.eval_size": 200})
    terminal = Terminal(quiet=True)
    opened = Opened(config, terminal)
    sampler = opened.sampler(opened.policy())
    found = opened.score(sampler, "scoring", samples=1)
    assert 0.30 < found.greedy.mean() < 0.55
    assert found.sampled is not None and 0.2 < found.sampled.mean() < 0.5


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        ((57, "+", 28), "7+8=15 5+2+1=8 so 85"),
        ((92, "-", 37), "12-7=5 8-3=5 so 55"),
        ((37, "-", 92), "92-37: 12-7=5 8-3=5 so -55"),
    ],
)
def test_worked_answers_are_right(problem: tuple[int, str, int], answer: str) -> None:
    assert make_tiny.worked(*problem, random.Random(0), 0.0) == answer


def test_hurried_answers_forget_carries() -> None:
    assert make_tiny.hurried(57, "+", 28, random.Random(0), 0.0) == "75"
    assert make_tiny.hurried(51, "+", 28, random.Random(0), 0.0) == "79"


def test_the_script_makes_a_model_that_loads(tmp_path: Path) -> None:
    short = {"steps": 60, "batch": 2, "warmup": 1}
    make_tiny.make(
        tmp_path / "tiny",
        0,
        shallow=make_tiny.SHALLOW._replace(**short),
        deep=make_tiny.DEEP._replace(**short),
        held_out_size=4,
    )
    assert load_policy(resolve(str(tmp_path / "tiny")), device="cpu").num_blocks == 12
