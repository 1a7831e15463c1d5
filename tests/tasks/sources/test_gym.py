import time
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward, list_tasks
from tests.tasks import toy_data

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def load(name: str, **settings: Any) -> Task:
    return toy_data.load(f"reasoning-gym:{name}", **{"train_size": 20, "eval_size": 5, **settings})


def scores(task: Task, texts: list[str]) -> tuple[list[float], list[float]]:
    rows = task.train[: len(texts)]
    columns = {key: [row[key] for row in rows] for key in ("question", "answer")}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [row["prompt"] for row in rows]
    return (
        task.reward(prompts=prompts, completions=completions, completion_ids=[[1]] * len(rows), **columns),
        task.score(prompts=prompts, completions=texts, **columns),
    )


def test_a_small_problem_space_is_taken_whole() -> None:
    task = load("chain_sum", args=ONE_DIGIT, train_size=4000, eval_size=300)
    assert len(task.train) + len(task.held_out) == 200  # 10 × 10 digits, plus or minus
    assert len(task.held_out) == 66
    assert task.note is not None
    assert not {row["question"] for row in task.train} & {row["question"] for row in task.held_out}
    assert set(task.train[0]) == {"prompt", "question", "answer"}


def test_thousands_of_problems_take_under_two_seconds() -> None:
    list_tasks()
    start = time.perf_counter()
    task = load("chain_sum", train_size=4000, eval_size=300)
    assert time.perf_counter() - start < 2
    assert (len(task.train), len(task.held_out), task.note) == (4000, 300, None)
    again = load("chain_sum", train_size=50, eval_size=300)
    assert again.held_out == task.held_out
    assert load("chain_sum", seed=1, eval_size=300).held_out != task.held_out


def test_the_verifier_scores_the_extracted_answer() -> None:
    task = load("chain_sum")
    right = [row["answer"] for row in task.train[:3]]
    reward, score = scores(task, [f"so it is {right[0]}.", f"<answer>{right[1]}</answer>", "none"])
    assert reward == [1.0, 1.0, 0.0]
    assert score == [1.0, 1.0, 0.0]
    assert (task.reward.__name__, task.score.__name__) == ("verifier", "solved")
    check_reward(task)


def test_a_partial_verifier_score_is_not_solved() -> None:
    task = load("palindrome_generation")
    reward, score = scores(task, ["xx"])
    assert 0 < reward[0] < 1
    assert score == [0.0]


def test_a_verifier_that_raises_counts_as_zero() -> None:
    assert scores(load("prime_factorization"), ["xx"])[0] == [0.0]
    assert scores(load("countdown"), ["9**9**9**9"])[0] == [0.0]


def test_arguments_with_their_defaults_are_the_same_task() -> None:
    assert load("chain_sum", args={"min_terms": 2}).fingerprint == load("chain_sum", seed=4).fingerprint
    assert load("chain_sum", args={"min_terms": 3}).fingerprint != load("chain_sum").fingerprint


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("chainsum", {}, "no dataset `chainsum`; the nearest names are chain_sum,"),
        ("chain_sum", {"max_term": 3}, r"no argument `max_term`; it has min_terms \(2\), max_terms \(6\)"),
        ("chain_sum", {"max_terms": 1}, "max_terms must be >= min_terms"),
        ("chain_sum", {"seed": 1}, "use --seed instead"),
    ],
)
def test_a_wrong_name_or_argument_lists_what_exists(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(name, args=args)


def test_tasks_are_listed() -> None:
    assert "chain_sum" in list_tasks()
    with pytest.raises(InputError, match="nearest names"):
        load("gdc")
