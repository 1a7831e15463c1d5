import json

import pytest

from midtune.errors import InputError
from midtune.tasks.code import fraction_passed
from midtune.tasks.sandbox.sandbox import Sandbox
from midtune.tasks.sources.programs import draw_programs, example
from midtune.tasks.split import Sizes
from tests.tasks.toy_data import load


def test_problems_are_fixed_by_the_seed() -> None:
    split = draw_programs(Sizes(20, 10, 3))
    assert split == draw_programs(Sizes(20, 10, 3))
    assert split != draw_programs(Sizes(20, 10, 4))
    assert (len(split.train), len(split.held_out)) == (20, 10)
    questions = {row["question"] for row in [*split.train, *split.held_out]}
    assert len(questions) == 30


def test_there_are_enough_problems_for_a_run() -> None:
    split = draw_programs(Sizes(1000, 300, 0))
    assert (len(split.train), len(split.held_out)) == (1000, 300)


def test_a_problem_is_small() -> None:
    row = example(0, 0)
    assert row["question"] == row["prompt"][0]["content"]
    assert row["question"].startswith("A Python function that returns ")
    assert row["question"].endswith(":\n\n```python\ndef f(x):\n    return")
    assert row["answer"].startswith("def f(x):\n    return ")
    tests = json.loads(row["tests"])
    assert tests["names"] == ["f"]
    assert [counts for _, counts in tests["steps"]] == [False] + [True] * 5


@pytest.mark.parametrize("index", range(8))
def test_the_answer_passes_as_a_whole_and_as_a_continuation(sandbox: Sandbox, index: int) -> None:
    row = example(0, index)
    body = row["answer"].removeprefix("def f(x):\n    return")
    assert fraction_passed(sandbox, row["answer"], row["tests"]) == 1.0
    assert fraction_passed(sandbox, body, row["tests"]) == 1.0
    assert fraction_passed(sandbox, " 'no'\n```", row["tests"]) == 0.0


def test_the_task_takes_no_arguments() -> None:
    with pytest.raises(InputError, match="tiny-programs takes no arguments"):
        load("tiny-programs", args={"size": 3})
