"""Problems from a jsonl or csv file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.tasks.split import Row

_JSONL = (".jsonl", ".jsonlines", ".json-lines", ".ndjson", ".json")
SUFFIXES = (*_JSONL, ".csv")


@dataclass(frozen=True)
class Problems:
    """The rows of a file, with `question` and `answer` as text, and a digest of the file."""

    rows: list[Row]
    digest: str


def is_file_name(name: str) -> bool:
    """Whether a task's name means a data file."""
    return name.lower().endswith(SUFFIXES) or Path(name).expanduser().exists()


def read_problems(
    name: str,
    *,
    prompt_column: str,
    answer_column: str,
    needs_answer: bool = True,
    prepare: Callable[[Row, str], Row] | None = None,
) -> Problems:
    """The problems of a jsonl or csv file, in its order; other columns are kept.

    Args:
        name: the file's path.
        prompt_column: column with the prompt, a text or a list of chat messages.
        answer_column: column with the right answer.
        needs_answer: False lets answers be missing, for rewards that do not compare.
        prepare: from a row as it stands in the file, and what messages call it, the row to read.

    Raises:
        InputError: the file is missing, empty or malformed, or a column, prompt or answer is missing.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"task file {path} does not exist; give the path of a jsonl or csv file.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"task file {path} is not UTF-8 text; give a jsonl or csv file.") from None
    if not text.strip():
        raise InputError(f"task file {path} is empty; it needs a problem on each line.")
    lines = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _jsonl_rows(path, text)
    if not lines:
        raise InputError(f"task file {path} has a header but no rows; it needs a problem on each line.")
    if prepare is not None:
        lines = [(line, prepare(row, f"line {line} of {path}")) for line, row in lines]
    columns = list(dict.fromkeys(key for _, row in lines for key in row))
    _check_column(path, columns, prompt_column, "prompt")
    if needs_answer or answer_column != "answer":
        _check_column(path, columns, answer_column, "answer")
    rows = [
        _row(path, line, {key: row.get(key) for key in columns}, prompt_column, answer_column, needs_answer)
        for line, row in lines
    ]
    _check_tabular(path, rows)
    return Problems(rows, hashlib.sha256(content).hexdigest())


def _jsonl_rows(path: Path, text: str) -> list[tuple[int, Row]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            hint = (
                "the file is one JSON array: write"
                if number == 1 and line.lstrip().startswith("[")
                else "write"
            )
            raise InputError(
                f"line {number} of {path} is not valid JSON; {hint} one JSON object a line."
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"line {number} of {path} is not a JSON object but {_kind(row)}; write one object a line, such as "
                '{"prompt": "2+2?", "answer": "4"}.'
            )
        rows.append((number, row))
    return rows


def _csv_rows(path: Path, text: str) -> list[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise InputError(
                    f"line {reader.line_num} of {path} has more fields than the header; "
                    "put fields that contain commas in double quotes."
                )
            rows.append((reader.line_num, dict(row)))
    except csv.Error as error:
        raise InputError(
            f"line {reader.line_num} of {path} is not valid csv ({error}); mend that line."
        ) from None
    return rows


def _check_column(path: Path, columns: list[str], wanted: str, role: str) -> None:
    if wanted not in columns:
        found = ", ".join(f"`{column}`" for column in columns) or "none"
        raise InputError(
            f"{path} has no column `{wanted}` for the {role}; its columns are {found}: "
            f"name one with --{role}-column."
        )


def _row(path: Path, line: int, row: Row, prompt_column: str, answer_column: str, needs_answer: bool) -> Row:
    messages = _messages(path, line, row[prompt_column], prompt_column)
    question = "\n".join(message["content"] for message in messages if message["role"] != "system").strip()
    if not question:
        raise InputError(
            f"line {line} of {path} has a blank prompt in column `{prompt_column}`; fill it or drop it."
        )
    answer = _text(row.get(answer_column))
    if needs_answer and not answer.strip():
        raise InputError(
            f"line {line} of {path} has no answer in column `{answer_column}`; fill it or drop it."
        )
    # TRL reads these names as the model's own output.
    others = {
        key: value for key, value in row.items() if key not in ("completion", "completions", "completion_ids")
    }
    return {**others, "prompt": messages, "question": question, "answer": answer}


def _messages(path: Path, line: int, prompt: Any, column: str) -> list[dict[str, str]]:
    if isinstance(prompt, list) and prompt:
        good = all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
        if good:
            return [{"role": message["role"], "content": message["content"]} for message in prompt]
    elif prompt is None or isinstance(prompt, (str, int, float)):
        return [{"role": "user", "content": _text(prompt)}]
    raise InputError(
        f"line {line} of {path} has a prompt that is neither a text nor a list of chat messages in column "
        f'`{column}`; write messages as {{"role": "user", "content": "…"}}.'
    )


def _check_tabular(path: Path, rows: list[Row]) -> None:
    # Trainers keep rows in Arrow tables, whose columns hold one kind of value each.
    import pyarrow as arrow

    for column in rows[0]:
        try:
            arrow.array([row[column] for row in rows])
        except (arrow.ArrowException, OverflowError):
            kinds = sorted({_kind(row[column]) for row in rows if row[column] is not None})
            raise InputError(
                f"column `{column}` of {path} mixes kinds of value ({', '.join(kinds)}), which a table cannot hold; "
                "write all of its values as text, or drop the column."
            ) from None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
