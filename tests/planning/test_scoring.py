from __future__ import annotations

from typing import Any

import pytest

from midtune.config import load_config
from midtune.planning.scoring import plan_scoring


def plan(available: int = 300, **settings: Any) -> tuple[int, float]:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    config = load_config(None, {"model.name": "other", "task.name": "other", **given})
    found = plan_scoring(config, available)
    return found.problems, found.share


def test_scoring_takes_at_most_its_share() -> None:
    # 100 steps of 32 completions at 1.3 are worth 4,160; 12 are scored for a problem: 2 greedy, 8 drawn, 2 deployed.
    # 15% of all is 3 / 17 of 4,160, which is 734 or 61 problems, and tens are easier to remember.
    assert plan() == (60, 720 / (720 + 4160))
    assert plan(training__steps=200) == (120, 1440 / (1440 + 8320))
    # Without samples and the unquantized model, 2: 367 problems, more than there are.
    assert plan(evaluation__samples=0, evaluation__deployed=False) == (300, 600 / 4760)


def test_there_is_a_floor_and_what_exists() -> None:
    assert plan(training__steps=10) == (50, 600 / (600 + 416))
    assert plan(20, training__steps=10) == (20, 240 / 656)


def test_a_number_is_that_number() -> None:
    assert plan(1000, task__eval_size=400) == (400, 4800 / (4800 + 4160))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        # 1.96 · 0.5 / √120 is 0.0895.
        (200, "scoring 120 problems before and after: about 15% of the run; the 95% interval of a greedy gain is about "
         "±9 points"),
        (10, "scoring 50 problems before and after, the fewest that say anything: about 59% of the run; "),
    ],
)  # fmt: skip
def test_it_is_said_in_a_line(steps: int, words: str) -> None:
    config = load_config(None, {"model.name": "other", "task.name": "other", "training.steps": steps})
    assert str(plan_scoring(config, 300)).startswith(words)
