import json
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
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
