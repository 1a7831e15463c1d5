"""A task in one Python file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.tasks import Task, check_reward, doubts, scored_samples
from midtune.tasks.sources.own import load_reward
from tests.tasks.toy_data import load

ROWS = """
def rows():
    return [{"prompt": f"{n} + 1?", "answer": n + 1, "level": "easy"} for n in range(12)]
"""
REWARD = """
def reward(prompts, completions, answer, level, **columns):
    assert set(level) == {"easy"}
    return [float(c[-1]["content"] == f"<answer>{a}</answer>") for c, a in zip(completions, answer)]
"""


def written(folder: Path, code: str) -> Path:
    path = folder / "mine.py"
    path.write_text(code)
    return path


def test_rows_and_reward_make_a_task(tmp_path: Path) -> None:
    task = load(written(tmp_path, ROWS + REWARD))
    assert (len(task.train), len(task.held_out)) == (9, 3)
    assert (task.reward, task.own_reward, task.reward.__name__) == (task.score, True, "reward")
    check_reward(task)
    row = task.train[0]
    right, wrong = scored_samples(task, row)
    assert (right.completion, right.score) == (f"<answer>{row['answer']}</answer>", 1.0)
    assert (wrong.completion, wrong.score) == (str(int(row["answer"]) + 1), 0.0)
    assert load(tmp_path / "mine.py", seed=3).fingerprint == task.fingerprint
    assert load(written(tmp_path, ROWS + REWARD + "\n#\n")).fingerprint != task.fingerprint


def test_without_a_reward_answers_are_compared(tmp_path: Path) -> None:
    task = load(written(tmp_path, ROWS))
    assert (task.reward.__name__, task.own_reward) == ("numeric", False)
    check_reward(task)


def test_a_reward_needs_no_answers_and_can_be_one_of_several(tmp_path: Path) -> None:
    code = "def rows(): return [{'prompt': f'p{n}'} for n in range(9)]\n"
    code += "def reward(completions, **columns): return [-1.0 * len(c) for c in completions]\n"
    check_reward(load(written(tmp_path, code)))
    own = f"{tmp_path / 'mine.py'}:reward"
    with pytest.raises(InputError, match="rewards reward, reward have one name twice"):
        load(tmp_path / "mine.py", reward=["verifier", own])


def test_training_and_evaluation_rows_stay_as_they_are(tmp_path: Path) -> None:
    code = """
def train_rows():
    return [{"prompt": f"train {n}", "answer": "yes"} for n in range(6)]

def eval_rows():
    return [{"prompt": f"eval {n}", "answer": "yes"} for n in range(2)]
"""
    task = load(written(tmp_path, code))
    assert {row["question"].split()[0] for row in task.train} == {"train"}
    assert [row["question"] for row in task.held_out] in (["eval 0", "eval 1"], ["eval 1", "eval 0"])
    with pytest.raises(InputError, match="2 questions are in both the 6 training and the 2 evaluation"):
        load(written(tmp_path, code.replace("eval {n}", "train {n}")))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def row(): ...", r"has to define `rows\(\)`, or .* and it has neither; its functions are `row`"),
        ("def rows(): return 3", r"`rows\(\)` of .* raised TypeError: 'int' object is not iterable"),
        ("def rows(): return []", "gave no rows; it must return a list of dicts with `prompt`"),
        (
            "def rows(): return [{'prompt': f'p{n}', 'answer': n} for n in range(9)] + ['x']",
            "row 10 of .* is not a dict but a text; fix it, or leave it out",
        ),
        ("def rows(): return [{'question_': 'p'}] * 9", "no column `prompt` or .* columns are `question_`"),
        (ROWS + "reward = 3", "`reward` of .* is not a function"),
        ("import nowhere", r"task file .* does not import \(ModuleNotFoundError"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(written(tmp_path, code))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def reward(completions, **columns): return [1.0]", "returned 1 values for 4 completions"),
        ("def reward(completions, **columns): return [float('inf')] * len(completions)", "finite numbers"),
        ("def reward(completions, **columns): return [1.0] * len(completions)", "no more than wrong ones"),
    ],
)
def test_a_wrong_reward_is_found_before_the_run(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_reward(load(written(tmp_path, ROWS + code)))


def test_a_missing_file() -> None:
    with pytest.raises(InputError, match=r"task file none.py does not exist; .* defines `rows\(\)`"):
        load("none.py")


SEES = """
seen = []

def sees(prompts, completions, **columns):
    seen.append({key: values for key, values in columns.items() if isinstance(values, list)})
    return [1.0 if prompt else 0.0 for prompt in prompts]
"""


def test_a_reward_gets_the_columns_of_its_file_as_they_are(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"Briefly: {n}?",
            "question": n,
            "answer": f"long {n}",
            "solution": f"\\boxed{{{n}}}",
            "mixed": n if n % 2 else [str(n)],
            "prompts": "mine",
            "completions": ["mine"],
            "completion": 1.5,
        }
        for n in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text(SEES)
    reward = f"{tmp_path / 'reward.py'}:sees"
    task = load(tmp_path / "data.jsonl", reward=reward, answer_column="solution")
    assert task.columns == ("prompt", "question", "answer", "solution", "mixed", "completion")
    assert task.note is not None
    assert (
        "the reward does not get the column `prompts`, the column `completions`: TRL passes its own"
        in task.note
    )
    row = task.held_out[0]
    columns = {key: [row[key]] for key in row if key != "prompt"}
    assert task.reward(prompts=[row["prompt"]], completions=["x"], completion_ids=[[1]], **columns) == [1.0]
    (module,) = (
        m for m in [*sys.modules.values()] if getattr(m, "__file__", None) == str(tmp_path / "reward.py")
    )
    found = module.seen[-1]
    own = rows[found["question"][0]]
    assert found == {"completion_ids": [[1]], **{key: [own[key]] for key in task.columns}}
    assert row["question"] == own["prompt"]
    assert row["answer"] == own["solution"]


def test_types_of_a_task_file_reach_its_reward(tmp_path: Path) -> None:
    code = """
from datetime import date
from fractions import Fraction

def rows():
    return [{"prompt": f"1/{n}?", "answer": Fraction(1, n), "day": date(2024, 1, n)} for n in range(2, 12)]

def reward(completions, answer, day, question):
    assert all(type(a) is Fraction and type(d) is date for a, d in zip(answer, day))
    assert all(q == f"1/{a.denominator}?" for q, a in zip(question, answer))
    return [float(c[-1]["content"] == str(a)) for c, a in zip(completions, answer)]
"""
    task = load(written(tmp_path, code))
    check_reward(task)
    right, wrong = scored_samples(task, task.train[0])
    assert (right.score, wrong.score) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("tokenizer", r"asks for `tokenizer`, .*they are `question`, .* AutoTokenizer.from_pretrained\.$"),
        ("processing_class", "asks for `processing_class`, .*load it in the reward's own file"),
        ("colour", "asks for `colour`, which is no column of the data .*take one of these"),
    ],
)
def test_what_a_reward_asks_for_and_nobody_passes_is_named(
    tmp_path: Path, parameter: str, message: str
) -> None:
    code = f"def reward(completions, {parameter}, **columns): return [1.0] * len(completions)"
    with pytest.raises(InputError, match=message):
        check_reward(load(written(tmp_path, ROWS + code)))


def test_a_reward_that_never_pays_is_doubted(tmp_path: Path) -> None:
    def task(value: str) -> Task:
        return load(
            written(tmp_path, ROWS.replace("answer", "a") + f"def reward(completions): return {value}")
        )

    with pytest.raises(InputError, match="`reward` of .* gives None for all of 18 completions of 9 problems"):
        doubts(task("[None for _ in completions]"))
    (doubt,) = doubts(task("[0 for _ in completions]"))
    assert (
        "never gave more than 0 for 18 completions of 9 problems, right and wrong ones (it gave 0)" in doubt
    )
    (doubt,) = doubts(task("[-len(c[0]['content']) for c in completions]"))
    assert "(it gave -14 to 0)" in doubt
    assert doubts(task("[len(c[0]['content']) for c in completions]")) == []
    rewarded = (
        ROWS + "def reward(completions, answer): return [c[0]['content'] == f'#### {a}' for c, a in zip("
    )
    assert doubts(load(written(tmp_path, rewarded + "completions, answer)]"))) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from os import getcwd\ndef f(): ...\ndef h(): ...\ndef _i(): ...",
            "no function `g`; its functions are `f`, `h`: ",
        ),
        ("import nowhere", r"does not import \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("def f(:", r"does not import \(SyntaxError"),
    ],
)
def test_files_and_functions_that_do_not_exist(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match="none.py does not exist"):
        load_reward(f"{tmp_path / 'none.py'}:f")
    with pytest.raises(InputError, match=message):
        load_reward(f"{written(tmp_path, code)}:g")
