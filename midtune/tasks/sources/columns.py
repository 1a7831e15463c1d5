"""From rows to problems: which columns are the prompt and the answer, and which rows are unusable."""

from __future__ import annotations

import datetime
import enum
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from midtune.config import TaskConfig
from midtune.errors import InputError
from midtune.tasks.answers import marked_answer, reference_answer
from midtune.tasks.environment import told_apart
from midtune.tasks.sources.files import ANSWER_COLUMNS, PROMPT_COLUMNS, BadRow, Line, kind
from midtune.tasks.split import Row

_DROP = "--set task.bad_rows=drop"
_SHOWN_FAULTS = 3
# The key of a problem that holds its row's index in `Problems.own`.
PLACE = "row"


@dataclass(frozen=True)
class Columns:
    """Which columns to read, and what to do with unusable rows."""

    settings: TaskConfig  # the columns' names, and what to do with bad rows and last turns
    needs_answer: bool = True  # False for rewards that do not compare
    prepare: Callable[[Row], Row] | None = None  # raw row → the row to read; raises BadRow
    carried: Sequence[str] | None = ()  # other columns that a problem keeps; None: all, for an environment


@dataclass(frozen=True)
class Problems:
    """Problems from rows: each has `prompt`, `question`, `answer`, and `row`, its index in `own`."""

    rows: list[Row]  # if all columns are carried, without `row` and with all of them in `question`
    columns: list[str]  # of the prompt and the answer
    own: list[Row]  # the rows as in the file; empty if all columns are carried
    note: str  # a remark for the person


def problems_of(source: str, lines: Sequence[Line], columns: Columns, first: int = 0) -> Problems:
    """Read the problems in rows, in order, the first at index `first`; InputError for unusable columns or rows."""
    settings = columns.settings
    prepared = [_read(line, columns.prepare) for line in lines] if columns.prepare else lines
    known = [line.row for line in prepared if line.row is not None]
    if not known:
        _refuse(source, prepared, len(prepared))
    names = list(dict.fromkeys(key for row in known for key in row))
    prompt = _column(source, known, names, settings.prompt_column, PROMPT_COLUMNS, "prompt")
    there = (_found(name, known, names) for name in ANSWER_COLUMNS)
    answer = settings.answer_column or next(filter(None, there), None)
    if columns.needs_answer or settings.answer_column not in (None, "answer"):
        # A conversation may hold the answer as its last turn.
        turns = _messages(_value(known[0], prompt))
        answered = turns is not None and turns[-1]["role"] == "assistant"
        known_answers = (*ANSWER_COLUMNS, prompt) if answered else ANSWER_COLUMNS
        answer = _column(source, known, names, settings.answer_column, known_answers, "answer")

    def problem(row: Row) -> Row:
        return _problem({name: row.get(name) for name in names}, prompt, answer, columns)

    read = [_read(line, problem) for line in prepared]
    rows = [line.row for line in read if line.row is not None]
    faults = [line for line in read if line.row is None]
    if faults and not (settings.bad_rows == "drop" and rows):
        _refuse(source, faults, len(read))
    own = []
    if columns.carried is None:
        rows = [told_apart(row) for row in rows]
    else:
        rows = [{**row, PLACE: place} for place, row in enumerate(rows, start=first)]
        own = [original.row or {} for line, original in zip(read, lines, strict=True) if line.row is not None]
    _check_tabular(source, rows)
    left_out = f"left out {len(faults)} of {len(prepared)} rows of {source}: {_listed(faults)}."
    return Problems(rows, [prompt, answer or "answer"], own, left_out if faults else "")


def _read(line: Line, make: Callable[[Row], Row]) -> Line:
    """Apply `make` to the line's row, or record the fault that it finds."""
    if line.row is None:
        return line
    try:
        return Line(line.place, make(line.row))
    except BadRow as error:
        return Line(line.place, None, str(error))


def _refuse(name: str, faults: Sequence[Line], total: int) -> None:
    found, them = f"{len(faults)} of {total} rows of {name} cannot be used: ", "them"
    if len(faults) == total:
        raise InputError(f"no row of {name} can be used: {_listed(faults)}; fix them.")
    if len(faults) == 1:
        found, them = "", "it"
    raise InputError(f"{found}{_listed(faults)}; fix {them}, or leave {them} out with {_DROP}.")


def _listed(faults: Sequence[Line]) -> str:
    """The first row of each fault, and how many others have it."""
    by_fault: dict[str, list[str]] = {}
    for line in faults:
        by_fault.setdefault(line.fault, []).append(line.place)
    shown = [
        f"{place} {fault}" + (f" (and {len(more)} more)" if more else "")
        for fault, (place, *more) in by_fault.items()
    ]
    return "; ".join(shown[:_SHOWN_FAULTS]) + "; …" * (len(shown) > _SHOWN_FAULTS)


def _column(
    name: str, rows: Sequence[Row], found: list[str], asked: str | None, known: Sequence[str], role: str
) -> str:
    wanted = [asked] if asked is not None else known
    for column in wanted:
        if (there := _found(column, rows, found)) is not None:
            return there
    listed = ", ".join(f"`{column}`" for column in found) or "none"
    raise InputError(
        f"{name} has no column {' or '.join(f'`{column}`' for column in wanted)} for the {role}; its columns are "
        f"{listed}: name one with --{role}-column."
    )


def _found(column: str, rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """The column's name in the file: headers match in any case, and `a.b` is the key `b` of an object in `a`."""
    same = [name for name in names if _plain(name) == _plain(column)]
    if same:
        return column if column in same else same[0]
    head, dot, key = column.rpartition(".")
    outer = _found(head, rows, names) if dot else None
    path = f"{outer}.{key}"
    return path if outer is not None and any(_value(row, path) is not None for row in rows) else None


def _plain(name: str) -> str:
    return str(name).strip().casefold()


def _value(row: Row, column: str) -> Any:
    if column in row:
        return row[column]
    head, _, key = column.rpartition(".")
    inner = _bare(_value(row, head)) if head else None
    return inner.get(key) if isinstance(inner, Mapping) else None


def _problem(row: Row, prompt_column: str, answer_column: str | None, columns: Columns) -> Row:
    """Make a problem of a row, or raise BadRow."""
    messages = _messages(_value(row, prompt_column))
    if messages is None:
        raise BadRow(
            f"has a prompt that is neither a text nor a list of chat messages in column `{prompt_column}` (write "
            'them as {"role": "user", "content": "…"})'
        )
    last_turn = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if last_turn is not None and columns.settings.last_turn == "stop":
        raise BadRow(
            f"has a conversation in column `{prompt_column}` that ends in the assistant's answer, which the model "
            "would be shown (leave such turns out with --set task.last_turn=cut)"
        )
    question = "\n".join(message["content"] for message in messages if message["role"] != "system").strip()
    if not question:
        raise BadRow(f"has a blank prompt in column `{prompt_column}`")
    given = last_turn if answer_column == prompt_column else _value(row, answer_column or "answer")
    answer, fault = _answer(given, answer_column or "answer")
    if columns.needs_answer:
        if fault or not answer.strip():
            raise BadRow(fault or f"has no answer in column `{answer_column}`")
        # A worked solution, such as NuminaMath's proofs, need not end in an answer.
        long_turn = answer_column == prompt_column and "\n" in answer
        if (long_turn or _plain(answer_column or "") == "solution") and marked_answer(answer) is None:
            raise BadRow(f"has no final answer (`\\boxed{{}}` or `####`) in column `{answer_column}`")
        if not reference_answer(answer).strip():
            raise BadRow(f"marks a blank answer in column `{answer_column}`")
    others = {key: value for key, value in row.items() if columns.carried is None or key in columns.carried}
    return {**others, "prompt": messages, "question": question, "answer": answer}


def _messages(prompt: Any) -> list[dict[str, str]] | None:
    """A prompt as chat messages: from a text, or messages in TRL's or ShareGPT's form; else None."""
    prompt = _scalar(prompt)
    if not isinstance(prompt, list):
        plain = prompt is None or isinstance(prompt, str | numbers.Number)
        return [{"role": "user", "content": "" if _is_missing(prompt) else str(prompt)}] if plain else None
    messages = [_message(message) for message in prompt]
    return [message for message in messages if message is not None] if messages and all(messages) else None


def _message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, Mapping):
        return None
    role, content = message.get("role"), message.get("content")
    if role is None and content is None:
        role, content = message.get("from"), message.get("value")
        role = {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else None
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    return {"role": role, "content": content} if isinstance(role, str) and isinstance(content, str) else None


def _answer(value: Any, column: str) -> tuple[str, str]:
    """The text of an answer, and what is wrong with it, if anything."""
    value = _bare(value)
    if _is_missing(value) or value == []:
        return "", ""
    if isinstance(value, Mapping | list):
        if (message := _message(value)) is not None:
            return message["content"], ""
        what = f"has a list of {len(value)} answers in column `{column}`, and an answer is one value"
        if isinstance(value, Mapping):
            keys = ", ".join(f"{column}.{key}" for key in value)
            what = f"has an object as its answer in column `{column}`; name what it holds with --answer-column ({keys})"
        return json.dumps(value, ensure_ascii=False, default=str), what
    if isinstance(value, bool):
        return json.dumps(value), ""
    if isinstance(value, (float, Decimal)):
        # 2.0, as pandas keeps whole numbers beside missing ones, and the decimal 2.00 are the number 2.
        whole = math.isfinite(value) and abs(float(value)) < 1e15 and value == int(value)
        return str(int(value)) if whole else str(value) if isinstance(value, float) else f"{value:f}", ""
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        value = value.date()
    if isinstance(value, bytes):
        try:
            return value.decode(), ""
        except UnicodeDecodeError:
            return "", f"has an answer in column `{column}` that is bytes and no UTF-8 text"
    return str(value), ""


def _bare(value: Any) -> Any:
    """Unwrap lists of one item."""
    value = _scalar(value)
    return _bare(value[0]) if isinstance(value, list) and len(value) == 1 else value


def _scalar(value: Any) -> Any:
    """Convert values of numpy, pandas and torch to plain Python; `tolist` of a 0-d array gives its one value."""
    if type(value).__name__ == "datetime64":
        value = value.astype("datetime64[us]")
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return list(value) if isinstance(value, tuple | set | frozenset) else value


def _is_missing(value: Any) -> bool:
    """Whether a value is None or one of pandas' missing values."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return value.strip().casefold() in ("nan", "<na>")
    return isinstance(value, float | Decimal) and math.isnan(value)


def _check_tabular(name: str, rows: list[Row]) -> None:
    # Trainers keep rows in Arrow tables, whose columns hold one kind of value each.
    import pyarrow as arrow

    for column in rows[0]:
        try:
            arrow.array([row[column] for row in rows])
        except (arrow.ArrowException, OverflowError):
            kinds = sorted({kind(row[column]) for row in rows if row[column] is not None})
            raise InputError(
                f"column `{column}` of {name} mixes kinds of value ({', '.join(kinds)}), which a table cannot hold; "
                "write all of its values as text, or drop the column."
            ) from None
