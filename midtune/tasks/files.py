"""Problems from rows: which columns are the prompt and the answer, and which rows cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.tasks.answers import marked_answer, reference_answer
from midtune.tasks.reading import SUFFIXES, Line, Source, kind
from midtune.tasks.split import Row

# As in GSM8K (question, answer), MATH and NuminaMath (problem, solution); the first that is there counts.
PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
DROP = "--set task.bad_rows=drop"
_SHOWN_FAULTS = 3
# TRL reads these names as the model's own output.
_TAKEN = ("completion", "completions", "completion_ids")


@dataclass(frozen=True)
class Columns:
    """Which columns to read, and what to do with rows that cannot be used.

    Args:
        prompt: column with the prompt, a text or a list of chat messages; None finds it.
        answer: column with the right answer; None finds it.
        needs_answer: False lets answers be missing, for rewards that do not compare.
        prepare: from a row as it stands, and what messages call it, the row to read.
        drop: leave out rows that cannot be used in place of refusing them.
    """

    prompt: str | None = None
    answer: str | None = None
    needs_answer: bool = True
    prepare: Callable[[Row, str], Row] | None = None
    drop: bool = False


@dataclass(frozen=True)
class Problems:
    """Rows with `prompt`, `question` and `answer`, and the columns these came from."""

    rows: list[Row]
    columns: list[str]
    note: str = ""


def is_file_name(name: str) -> bool:
    """Whether a task's name means a data file or a folder of them."""
    return name.lower().endswith(SUFFIXES) or Path(name).expanduser().exists()


def problems_of(source: Source, lines: Sequence[Line], columns: Columns) -> Problems:
    """The problems in some rows of a source, in their order; other columns are kept.

    Raises:
        InputError: a column is missing or mixes kinds of value, rows cannot be used and are not to be left out,
            or none can.
    """
    prepared = [_prepared(line, columns.prepare) for line in lines]
    known = [line.row for line in prepared if line.row is not None]
    if not known:
        _refuse(source.name, prepared, len(prepared))
    names = list(dict.fromkeys(key for row in known for key in row))
    prompt = _column(source.name, names, columns.prompt, PROMPT_COLUMNS, "prompt")
    answer = columns.answer or next((name for name in ANSWER_COLUMNS if name in names), None)
    if columns.needs_answer or columns.answer not in (None, "answer"):
        answer = _column(source.name, names, columns.answer, ANSWER_COLUMNS, "answer")
    rows, faults = [], []
    for line in prepared:
        problem, fault = None, line.fault
        if line.row is not None:
            complete = {name: line.row.get(name) for name in names}
            problem, fault = _problem(complete, prompt, answer, columns.needs_answer)
        if problem is not None:
            rows.append(problem)
        else:
            faults.append(Line(line.place, None, fault))
    if faults and not (columns.drop and rows):
        _refuse(source.name, faults, len(prepared))
    _check_tabular(source.name, rows)
    left_out = f"left out {len(faults)} of {len(prepared)} rows of {source.name}: {_listed(faults)}."
    return Problems(rows, [prompt, answer or "answer"], left_out if faults else "")


def _prepared(line: Line, prepare: Callable[[Row, str], Row] | None) -> Line:
    if line.row is None or prepare is None:
        return line
    try:
        return Line(line.place, prepare(line.row, line.place))
    except InputError as error:
        fault = str(error).removeprefix(line.place).strip().partition("; mend it")[0].rstrip(".")
        return Line(line.place, None, fault)


def _refuse(name: str, faults: Sequence[Line], total: int) -> None:
    if len(faults) == total:
        raise InputError(f"no row of {name} can be used: {_listed(faults)}; mend them.")
    if len(faults) == 1:
        raise InputError(f"{_listed(faults)}; mend it, or leave it out with {DROP}.")
    raise InputError(
        f"{len(faults)} of {total} rows of {name} cannot be used: {_listed(faults)}; mend them, or leave them out "
        f"with {DROP}."
    )


def _listed(faults: Sequence[Line]) -> str:
    shown = "; ".join(f"{line.place} {line.fault}" for line in faults[:_SHOWN_FAULTS])
    return shown + "; …" * (len(faults) > _SHOWN_FAULTS)


def _column(name: str, found: list[str], asked: str | None, known: Sequence[str], role: str) -> str:
    wanted = [asked] if asked is not None else known
    for column in wanted:
        if column in found:
            return column
    listed = ", ".join(f"`{column}`" for column in found) or "none"
    raise InputError(
        f"{name} has no column {' or '.join(f'`{column}`' for column in wanted)} for the {role}; its columns are "
        f"{listed}: name one with --{role}-column."
    )


def _problem(
    row: Row, prompt_column: str, answer_column: str | None, needs_answer: bool
) -> tuple[Row | None, str]:
    """A row as a problem, or what is wrong with it."""
    messages = _messages(row[prompt_column])
    if messages is None:
        return None, (
            f"has a prompt that is neither a text nor a list of chat messages in column `{prompt_column}` (write "
            'them as {"role": "user", "content": "…"})'
        )
    question = "\n".join(message["content"] for message in messages if message["role"] != "system").strip()
    if not question:
        return None, f"has a blank prompt in column `{prompt_column}`"
    answer = _text(row.get(answer_column)) if answer_column is not None else ""
    if needs_answer:
        if not answer.strip():
            return None, f"has no answer in column `{answer_column}`"
        # A worked solution, such as NuminaMath's proofs, need not end in an answer.
        if answer_column == "solution" and marked_answer(answer) is None:
            return None, "has no final answer (`\\boxed{}` or `####`) in column `solution`"
        if not reference_answer(answer).strip():
            return None, f"marks a blank answer in column `{answer_column}`"
    others = {key: value for key, value in row.items() if key not in _TAKEN}
    return {**others, "prompt": messages, "question": question, "answer": answer}, ""


def _messages(prompt: Any) -> list[dict[str, str]] | None:
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
    return None


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


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
