"""Training and held-out problems that never share a question."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from midtune.errors import InputError

Row = dict[str, Any]

FEWEST_QUESTIONS = 6
_HELD_OUT_SHARE = 0.25  # of an endless task's questions; a finite task gives at most a third


@dataclass(frozen=True)
class Sizes:
    """The most problems to train on and to hold out, and the seed that draws and splits them."""

    train: int
    held_out: int
    seed: int


@dataclass(frozen=True)
class Split:
    """Training and held-out problems, and how many different questions there were."""

    train: list[Row]
    held_out: list[Row]
    distinct: int | None  # None: the source was not drawn to its end
    left_out: int = 0  # shared questions, dropped from training


def problem(prompt: str, question: str, answer: str = "", **columns: Any) -> Row:
    """A problem whose prompt is one user message."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "question": question,
        "answer": answer,
        **columns,
    }


def question_key(question: str) -> str:
    """The text without differences in whitespace; questions with one key are the same."""
    return " ".join(question.split())


def rank(key: str, seed: int) -> float:
    """A number in [0, 1) fixed by question and seed alone, in any process."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_rows(rows: Sequence[Row], sizes: Sizes) -> Split:
    """Split rows in an order that the seed fixes; hold out at most a third; keep the first row of equal questions.

    Raises InputError for fewer than six different questions.
    """
    different = _different(rows)
    held_out = _held_out_count(len(different), sizes)
    chosen = _in_order(different, sizes.seed)
    return Split(chosen[held_out : held_out + sizes.train], chosen[:held_out], len(different))


def given_split(train: Sequence[Row], held_out: Sequence[Row], sizes: Sizes, *, drop: bool = False) -> Split:
    """Keep a given split, in an order that the seed fixes; `drop` takes shared questions out of training.

    Raises InputError if questions are in both lists without `drop`, or a list has too few.
    """
    of_train, of_held_out = _different(train), _different(held_out)
    shared = [key for key in of_train if key in of_held_out]
    if shared and not drop:
        noun = "question is" if len(shared) == 1 else "questions are"
        raise InputError(
            f"{len(shared)} {noun} in both the {len(of_train)} training and the {len(of_held_out)} evaluation "
            f"problems, first {shared[0][:200]!r}; take them out of one side, or leave them out of training with "
            "--set task.bad_rows=drop."
        )
    for key in shared:
        del of_train[key]
    if len(of_train) < 4 or len(of_held_out) < 2:
        raise InputError(
            f"there are {len(of_train)} different training and {len(of_held_out)} evaluation problems, and at least "
            "4 and 2 are needed; give more."
        )
    chosen = _in_order(of_train, sizes.seed), _in_order(of_held_out, sizes.seed)
    return Split(chosen[0][: sizes.train], chosen[1][: sizes.held_out], None, len(shared))


def draw_split(draw: Callable[[int, int], Sequence[Row]], sizes: Sizes) -> Split:
    """Split the problems of an endless or unknown source, whose items `draw(start, stop)` gives.

    A hash puts each question on its side, so both have the source's own mix, and the number of training problems does
    not change the held-out ones. A source that brings no new questions counts as finite.

    Raises InputError for fewer than six different questions.
    """
    rows: dict[str, Row] = {}
    held_out: dict[str, None] = {}  # a set in order
    stale, is_full = 0, False
    for row in _drawn(draw, sizes):
        key = question_key(row["question"])
        stale = stale + 1 if key in rows else 0
        if key not in rows and rank(key, sizes.seed) < _HELD_OUT_SHARE:
            held_out[key] = None
        rows.setdefault(key, row)
        is_full = len(held_out) >= sizes.held_out and len(rows) - len(held_out) >= sizes.train
        # Among n equally likely questions one is missed by 4n draws with probability e^-4.
        if is_full or stale >= max(200, min(4 * len(rows), 4000)):
            break
    if not is_full:
        held_out = dict.fromkeys([*(held_out | dict.fromkeys(rows))][: _held_out_count(len(rows), sizes)])
    train = [row for key, row in rows.items() if key not in held_out]
    chosen = [rows[key] for key in held_out]
    return Split(train[: sizes.train], chosen[: sizes.held_out], None if is_full else len(rows))


def _drawn(draw: Callable[[int, int], Sequence[Row]], sizes: Sizes) -> Iterator[Row]:
    start = 0
    batch = int(max(sizes.train / (1 - _HELD_OUT_SHARE), sizes.held_out / _HELD_OUT_SHARE) * 1.02) + 16
    while start < 20 * (sizes.train + sizes.held_out) + 1000:
        yield from draw(start, start + batch)
        start += batch
        batch = max(batch // 2, 256)


def _different(rows: Sequence[Row]) -> dict[str, Row]:
    different: dict[str, Row] = {}
    for row in rows:
        different.setdefault(question_key(row["question"]), row)
    return different


def _in_order(different: dict[str, Row], seed: int) -> list[Row]:
    return [different[key] for key in sorted(different, key=lambda key: (rank(key, seed), key))]


def _held_out_count(distinct: int, sizes: Sizes) -> int:
    if distinct < FEWEST_QUESTIONS:
        raise InputError(
            f"the task has only {distinct} different question{'s' * (distinct != 1)}, and training and held-out "
            f"problems need at least {FEWEST_QUESTIONS} together; give it more problems."
        )
    return min(sizes.held_out, distinct // 3)
