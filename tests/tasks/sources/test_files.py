"""Data as GSM8K, MATH and NuminaMath have it, from files and folders, and what is wrong with it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest

from midtune.errors import InputError
from midtune.tasks import check_reward
from midtune.tasks.sources.files import FORMATS, of_splits
from midtune.tasks.sources.hub_dataset import is_dataset
from tests.tasks.toy_data import SPLITS, gsm8k, load, math, scores, write


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_gsm8k_is_read_whatever_its_format(tmp_path: Path, suffix: str) -> None:
    task = load(write(tmp_path / f"data.{suffix}", gsm8k(12)))
    assert (len(task.train), len(task.held_out), task.reward.__name__) == (9, 3, "numeric")
    assert scores(task, "So #### {n+1}") == [1.0, 1.0]
    assert scores(task, "So #### {n}") == [0.0, 0.0]
    check_reward(task)
    again = load(write(tmp_path / "same.jsonl", gsm8k(12)))
    assert [row["question"] for row in task.train] == [row["question"] for row in again.train]


def test_math_is_compared_by_the_value_of_its_boxed_answers(tmp_path: Path) -> None:
    task = load(write(tmp_path / "math.jsonl", math(12, start=1)))
    assert task.reward.__name__ == "math"
    assert scores(task, r"<think>hm</think> \boxed{\sqrt{2}\cdot{n}}") == [1.0, 1.0]
    assert scores(task, r"<answer>$\frac{2\cdot{n}}{\sqrt{2}}$</answer>") == [1.0, 1.0]
    assert scores(task, r"\boxed{{n}}") == [0.0, 0.0]
    check_reward(task)


def test_columns_are_found_and_can_be_named(tmp_path: Path) -> None:
    rows = [{"problem": f"P{n}", "solution": rf"\boxed{{{n}}}", "answer": n, "q": f"Q{n}"} for n in range(9)]
    path = write(tmp_path / "numina.jsonl", rows)
    found = load(path).train[0]
    assert (found["question"][0], found["answer"]) == ("P", found["question"][1:])
    named = load(path, prompt_column="q", answer_column="solution").train[0]
    assert (named["question"][0], named["answer"][:6]) == ("Q", "\\boxed")


def test_a_worked_solution_without_a_final_answer_is_a_bad_row(tmp_path: Path) -> None:
    rows = [*math(8), {"problem": "Prove it.", "solution": "As is obvious. Q.E.D."}]
    path = write(tmp_path / "proofs.parquet", rows)
    with pytest.raises(InputError, match=r"row 9 of .*proofs.parquet has no final answer .*bad_rows=drop\.$"):
        load(path)
    task = load(path, bad_rows="drop")
    assert len(task.train) + len(task.held_out) == 8
    assert task.note is not None and "left out 1 of 9 rows" in task.note


def test_bad_rows_are_counted_shown_with_their_lines_and_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", gsm8k(8))
    bad = ["{oops", "3", '{"question": " ", "answer": "1"}', '{"question": "What?", "answer": null}']
    path.write_text("\n".join([*bad[:2], path.read_text(), *bad[2:]]))
    with pytest.raises(InputError) as raised:
        load(path)
    assert str(raised.value) == (
        f"4 of 12 rows of {path} cannot be used: line 1 of {path} is not valid JSON; line 2 of {path} is not a "
        f"JSON object but a number; line 11 of {path} has a blank prompt in column `question`; …; fix them, or "
        "leave them out with --set task.bad_rows=drop."
    )
    task = load(path, bad_rows="drop")
    assert len(task.train) + len(task.held_out) == 8
    assert task.note is not None and f"left out 4 of 12 rows of {path}: line 1" in task.note


def test_a_folder_keeps_training_and_test_files_apart(tmp_path: Path) -> None:
    write(tmp_path / "main/train-00000-of-00002.parquet", gsm8k(5))
    write(tmp_path / "main/train-00001-of-00002.parquet", gsm8k(5, start=5))
    write(tmp_path / "main/test-00000-of-00001.parquet", gsm8k(4, start=50))
    write(tmp_path / "main/validation.jsonl", gsm8k(4, start=90))
    (tmp_path / "dataset_infos.json").write_text('{"main": {"splits": [{"name": "train"}]}}')
    (tmp_path / "README.md").write_text("Problems.")
    task = load(tmp_path, eval_size=10)
    assert {row["question"] for row in task.train} == {row["question"] for row in gsm8k(10)}
    assert {row["question"] for row in task.held_out} == {row["question"] for row in gsm8k(4, start=50)}
    assert task.note == (
        f"{tmp_path}: left out README.md, dataset_infos.json, with no problems in {FORMATS}. of {tmp_path}, "
        "validation (main/validation.jsonl) is not used."
    )


def test_a_folder_without_a_test_file_is_split(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", gsm8k(6))
    write(tmp_path / "b.jsonl", gsm8k(6, start=4))
    task = load(tmp_path)
    assert (len(task.train), len(task.held_out)) == (7, 3)
    with pytest.raises(
        InputError, match="the folder .* has no jsonl, json, csv, tsv, parquet or arrow files"
    ):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")


def test_questions_in_training_and_evaluation_are_refused_or_dropped(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", gsm8k(8))
    shared = [{"question": " Problem\n 6? ", "answer": "7"}, {"question": "Problem 7?", "answer": "8"}]
    other = write(tmp_path / "other.jsonl", [*gsm8k(3, start=20), *shared])
    with pytest.raises(InputError) as raised:
        load(train, eval_file=str(other))
    assert str(raised.value) == (
        "2 questions are in both the 8 training and the 5 evaluation problems, first 'Problem 6?'; take them out "
        "of one side, or leave them out of training with --set task.bad_rows=drop."
    )
    task = load(train, eval_file=str(other), bad_rows="drop", eval_size=9)
    assert (len(task.train), len(task.held_out)) == (6, 5)
    assert task.note == "left out 2 training questions that evaluation has too."
    assert load(train).fingerprint != task.fingerprint


def test_a_file_that_is_no_parquet_and_a_task_that_draws_its_own(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="broken.parquet is not a parquet file that can be read"):
        load(broken)
    with pytest.raises(InputError, match="draws its own evaluation problems"):
        load("reasoning-gym:chain_sum", eval_file="other.jsonl")


def test_of_a_long_split_evenly_spaced_rows_are_read() -> None:
    parts = {part: datasets.Dataset.from_list(rows) for part, rows in SPLITS.items()}
    thinned = of_splits("openai/gsm8k", parts, most_rows=4)
    assert [line.row for line in thinned.lines] == SPLITS["train"][::2]
    assert [line.row for line in thinned.evaluation or []] == SPLITS["test"]
    assert thinned.note == "openai/gsm8k is long: one row in 2 of train is read."


ROWS = gsm8k(12)
QUESTIONS = {row["question"] for row in ROWS}


def delimited(delimiter: str) -> str:
    return "".join(f"{row['question']}{delimiter}{row['answer'].split()[-1]}\n" for row in ROWS)


LINES = "\n".join(map(json.dumps, ROWS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(ROWS, indent=2).encode()),
        ("array.jsonl", json.dumps(ROWS).encode()),
        ("lines.json", LINES),
        ("key.json", json.dumps({"version": "1", "data": ROWS}).encode()),
        ("columns.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode()),
        (
            "pandas.json",
            json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}).encode(),
        ),
        ("data.jsonl.gz", gzip.compress(LINES)),
        ("data.json.bz2", bz2.compress(LINES)),
        ("data.JSONL.xz", lzma.compress(LINES)),
        ("data.tsv", ("question\tanswer\n" + delimited("\t")).encode()),
        ("data.csv.gz", gzip.compress(("question,answer\n" + delimited(",")).encode())),
        ("excel.csv", ("\ufeffQUESTION;Answer \n" + delimited(";")).replace("\n", "\r\n").encode()),
        ("named.csv", ("sep=;\nQuestion;Answer\n" + delimited(";")).encode()),
        ("unicode.csv", ("Question\tAnswer\n" + delimited("\t")).encode("utf-16")),
    ],
)
def test_published_forms_of_files_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    task = load(tmp_path / name)
    assert {row["question"] for row in [*task.train, *task.held_out]} == QUESTIONS
    assert task.reward.__name__ == "numeric"
    assert scores(task, "So #### {n+1}") == [1.0, 1.0]
    assert not is_dataset(f"data/{name}")


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    parts = {part: datasets.Dataset.from_list(rows) for part, rows in SPLITS.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    task = load(tmp_path / "both", eval_size=9)
    assert {row["question"] for row in task.train} == {row["question"] for row in SPLITS["train"]}
    assert {row["question"] for row in task.held_out} == {row["question"] for row in SPLITS["test"]}
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    (file,) = (tmp_path / "one").glob("*.arrow")
    for path in (tmp_path / "one", file):
        task = load(path)
        assert {row["question"] for row in [*task.train, *task.held_out]} == QUESTIONS
    (tmp_path / "both/dataset_dict.json").write_text("{}")
    with pytest.raises(InputError, match="which `save_to_disk` wrote, cannot be read"):
        load(tmp_path / "both")


@pytest.mark.parametrize(
    "name", ["test.json", "test.jsonl.gz", "test.tsv", "testing.csv", "data/test-00000.json"]
)
def test_a_folders_test_file_is_kept_apart_in_any_format(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", gsm8k(6))
    rows = gsm8k(4, start=50)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(rows)
    if path.suffix in (".tsv", ".csv"):
        mark = "\t" if path.suffix == ".tsv" else ","
        text = f"question{mark}answer\n" + "".join(f"{row['question']}{mark}1\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    task = load(tmp_path, eval_size=9)
    assert {row["question"] for row in task.train} == {row["question"] for row in gsm8k(6)}
    assert {row["question"] for row in task.held_out} == {row["question"] for row in rows}


def test_splits_that_are_put_together_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", gsm8k(6))
    write(tmp_path / "heldout.jsonl", gsm8k(6, start=50))
    note = load(tmp_path, train_size=9).note
    assert note == (
        f"{tmp_path} has no evaluation split, so what has no split (heldout.jsonl) and train (train.jsonl) is split "
        "anew."
    )


def test_maths_folders_have_a_problem_a_file(tmp_path: Path) -> None:
    for part, start in (("train", 1), ("test", 50)):
        for n, row in enumerate(math(6, start=start)):
            path = tmp_path / part / "algebra" / f"{n}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=2))
    task = load(tmp_path, eval_size=9)
    assert (len(task.train), len(task.held_out), task.note) == (6, 6, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl.gz", b"no gzip", "is not a .gz file that can be read"),
        ("data.jsonl.gz", gzip.compress(LINES)[:-20], "is not a .gz file that can be read"),
        ("data.json.xz", b"no", "is not a .xz file that can be read"),
        ("data.arrow", b"no arrow at all", "is not an arrow file that can be read"),
        ("data.csv", "Question;Answer\né;1\n".encode("latin-1"), "not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)
