import datetime
import decimal
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from midtune.config import TaskConfig
from midtune.errors import InputError
from midtune.tasks import Task
from midtune.tasks.sources.columns import Columns, problems_of
from midtune.tasks.sources.files import Line
from tests.tasks.toy_data import load

ROWS = [{"prompt": f"{n} + {n} = ?", "answer": 2 * n, "level": "easy"} for n in range(12)]


def jsonl(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_keeps_other_columns_and_gets_the_numeric_reward(tmp_path: Path) -> None:
    task = load(jsonl(tmp_path, ROWS))
    assert (len(task.train), len(task.held_out)) == (9, 3)
    assert set(task.train[0]) == {"prompt", "question", "answer", "row"}
    assert task.train[0]["prompt"] == [{"role": "user", "content": task.train[0]["question"]}]
    assert isinstance(task.train[0]["answer"], str)
    assert task.reward.__name__ == "numeric"
    assert task.note is not None
    assert "gave only 12 different ones: 9 to train on and 3 held out" in task.note


def test_csv_gives_the_same_problems_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("\ufeffq,a\n" + "".join(f'"{row["prompt"]}",{row["answer"]}\n' for row in ROWS))
    task = load(path, prompt_column="q", answer_column="a")
    same = load(jsonl(tmp_path, ROWS))
    assert [row["question"] for row in task.train] == [row["question"] for row in same.train]
    assert [row["answer"] for row in task.held_out] == [row["answer"] for row in same.held_out]


def test_chat_prompts_keep_their_turns_and_the_system_prompt_is_replaced(tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "old"}, {"role": "user", "content": f"Capital {n}?"}] for n in range(6)
    ]
    path = jsonl(tmp_path, [{"prompt": chat, "answer": "Paris"} for chat in chats])
    assert load(path).train[0]["prompt"][0] == {"role": "system", "content": "old"}
    row = load(path, system_prompt="new").train[0]
    assert row["prompt"] == [
        {"role": "system", "content": "new"},
        {"role": "user", "content": row["question"]},
    ]
    assert load(path).reward.__name__ == "exact"


def test_the_fingerprint_changes_with_the_task_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ROWS)
    same = load(path).fingerprint
    assert len(same) == 16
    assert load(path, seed=5, train_size=4, eval_size=2).fingerprint == same
    assert load(jsonl(tmp_path, ROWS, "copy.jsonl")).fingerprint == same
    others = [
        load(path, reward="exact").fingerprint,
        load(path, system_prompt="Be brief.").fingerprint,
        load(jsonl(tmp_path, ROWS[1:], "less.jsonl")).fingerprint,
    ]
    assert len({same, *others}) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "is empty"),
        ([{"prompt": "a", "answer": "b"}, "{oops"], "line 2 of .* is not valid JSON"),
        (["[", '{"prompt": "a"},', "]"], "one JSON array, and it is not valid JSON .*line 3"),
        (["[]"], "has brackets but no rows"),
        ([{"prompt": "a", "answer": "b"}, "", "3"], "line 3 of .* not a JSON object but a number"),
        (
            [{"text": "a", "answer": "b"}],
            "no column `prompt` or `question` or `problem` .* are `text`, `answer`: .* --prompt-column",
        ),
        (
            [{"prompt": "a", "label": "b"}],
            "no column `answer` or `solution` .* are `prompt`, `label`: .* --answer-column",
        ),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "  ", "answer": "b"}], "line 2 of .* blank prompt"),
        ([{"prompt": [{"text": "a"}], "answer": "b"}], "line 1 of .* neither a text nor a list of chat"),
        ([{"prompt": "a", "answer": None}], "line 1 of .* has no answer"),
        ([{"prompt": "a", "answer": "b"}] * 9, "only 1 different question,"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(jsonl(tmp_path, lines))
    assert str(raised.value).endswith(".")


def test_a_missing_file_a_wide_csv_row_and_arguments_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.jsonl does not exist"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="`data.xlsx` is a .xlsx file"):
        load("data.xlsx")
    wide = tmp_path / "wide.csv"
    wide.write_text("prompt,answer\na,b\na,b,c\n")
    with pytest.raises(InputError, match="line 3 of .* more fields than the header"):
        load(wide)
    with pytest.raises(InputError, match="takes no arguments"):
        load(jsonl(tmp_path, ROWS), args={"size": 3})


SUMS = [(f"What is {n} + {n}?", 2 * n) for n in range(12)]


def sums(**columns: Any) -> list[Any]:
    """Rows with further columns, each a function of the sum."""
    return [
        {"question": question, **{key: of(value) for key, of in columns.items()}} for question, value in SUMS
    ]


def table(folder: Path, rows: list[Any]) -> Path:
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


def answers(task: Task) -> set[tuple[str, str]]:
    return {(row["question"], row["answer"]) for row in [*task.train, *task.held_out]}


AS_TEXT = {(question, str(value)) for question, value in SUMS}


@pytest.mark.parametrize(
    "wrap",
    [
        float,
        decimal.Decimal,
        lambda value: decimal.Decimal(value).quantize(decimal.Decimal("1.00")),
        lambda value: str(value).encode(),
        lambda value: [str(value)],
        lambda value: [[value]],
        lambda value: [{"role": "assistant", "content": str(value)}],
    ],
)
def test_an_answer_is_one_value_however_parquet_keeps_it(tmp_path: Path, wrap: Any) -> None:
    task = load(table(tmp_path, sums(answer=wrap)))
    assert answers(task) == AS_TEXT
    assert task.reward.__name__ == "numeric"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.int64(7), "7"),
        (np.float32(0.5), "0.5"),
        (np.str_("B"), "B"),
        (np.array([7]), "7"),
        (np.datetime64("2024-01-05"), "2024-01-05"),
        (np.datetime64("2024-01-05", "ns"), "2024-01-05"),
        (Fraction(-1, 8), "-1/8"),
        (decimal.Decimal("12.50"), "12.50"),
        (datetime.date(2024, 1, 5), "2024-01-05"),
        (datetime.datetime(2024, 1, 5, 6, 7), "2024-01-05 06:07:00"),
        (True, "true"),
        ({3}, "3"),
    ],
)
def test_an_answer_is_one_value_however_python_keeps_it(value: Any, text: str) -> None:
    lines = [Line("row 1", {"prompt": "p", "answer": value})]
    problems = problems_of("mine", lines, Columns(TaskConfig()))
    assert problems.rows == [
        {"prompt": [{"role": "user", "content": "p"}], "question": "p", "answer": text, "row": 0}
    ]
    assert problems.own[0]["answer"] is value


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["1", "2"], "has a list of 2 answers in column `answer`, and an answer is one value"),
        ({"ground_truth": "1"}, r"object as its answer .* with --answer-column \(answer.ground_truth\)"),
        (b"\xff", "that is bytes and no UTF-8 text"),
        *(
            (value, "has no answer in column `answer`")
            for value in (float("nan"), np.nan, "nan", "NaN", None, [])
        ),
        *(
            (value, "has no answer in column `answer`")
            for value in (decimal.Decimal("NaN"), np.datetime64("NaT"))
        ),
    ],
)
def test_what_is_not_one_answer_is_a_bad_row(answer: Any, message: str) -> None:
    lines = [Line("row 1", {"prompt": "p", "answer": answer})]
    with pytest.raises(InputError, match=message):
        problems_of("mine", lines, Columns(TaskConfig()))


def test_a_missing_answer_changes_nothing_for_other_rows(tmp_path: Path) -> None:
    rows = [*sums(answer=float), {"question": "What?", "answer": float("nan")}]
    for path in (table(tmp_path, rows), jsonl(tmp_path, rows)):
        task = load(path, bad_rows="drop")
        assert (answers(task), task.reward.__name__) == (AS_TEXT, "numeric")
    (tmp_path / "data.csv").write_text(
        "question,answer\n" + "".join(f"{q},{a}\n" for q, a in SUMS) + "A?,nan\nB?,\nC?,null\nD?,<NA>\n"
    )
    task = load(tmp_path / "data.csv", bad_rows="drop")
    assert (answers(task), task.reward.__name__) == (AS_TEXT, "numeric")
    assert task.note is not None and "line 14 of" in task.note and "(and 3 more)" in task.note


def test_verls_columns_are_found_and_a_key_can_be_named(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"style": "rule", "ground_truth": str(value)},
            "extra_info": {"answer": str(value + 1)},
        }
        for question, value in SUMS
    ]
    assert answers(load(table(tmp_path, rows))) == AS_TEXT
    named = load(table(tmp_path, rows), answer_column="Extra_Info.answer")
    assert answers(named) == {(question, str(value + 1)) for question, value in SUMS}
    with pytest.raises(InputError, match="no column `extra_info.solution`"):
        load(table(tmp_path, rows), answer_column="extra_info.solution")


@pytest.mark.parametrize(
    "chat",
    [
        lambda q, a: {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"#### {a}"}]
        },
        lambda q, a: {
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": f"#### {a}"}]
        },
    ],
)
def test_an_answer_at_the_end_of_a_prompt_is_refused_or_cut(tmp_path: Path, chat: Any) -> None:
    rows = [chat(question, value) for question, value in SUMS]
    with pytest.raises(
        InputError, match=r"ends in the assistant's answer, .*last_turn=cut\) \(and 11 more\)"
    ):
        load(jsonl(tmp_path, rows))
    task = load(jsonl(tmp_path, rows), last_turn="cut")
    assert answers(task) == {(question, f"#### {value}") for question, value in SUMS}
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in task.train)
    given = [row | {"answer": 2} for row in rows]
    assert answers(load(jsonl(tmp_path, given), last_turn="cut")) == {(question, "2") for question, _ in SUMS}


def test_headers_count_in_any_case_and_an_unused_column_may_mix_kinds(tmp_path: Path) -> None:
    rows = [{" Question": q, "ANSWER": a, "meta": a if a % 4 else "x"} for q, a in SUMS]
    assert answers(load(jsonl(tmp_path, rows))) == AS_TEXT
