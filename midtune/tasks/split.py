"""Training and held-out problems that never share a question."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midtune.errors import InputError

Row = dict[str, Any]

FEWEST_QUESTIONS = 6
_HELD_OUT_SHARE = 0.25  # of an endless task's questions; a finite task gives at most a third


@dataclass(frozen=True)
class Split:
    """Two lists of problems, and how many different questions there were to share."""

    train: list[Row]
    held_out: list[Row]
    distinct: int | None  # None: the source was not drawn to its end


@dataclass
class _Pool:
    """Different questions in the order in which they came, each with its side."""

    seed: int
    rows: dict[str, Row] = field(default_factory=dict)
    sides: dict[str, bool] = field(default_factory=dict)  # True: held out
    held_out_count: int = 0

    def add(self, row: Row) -> bool:
        key = question_key(row["question"])
        if key in self.rows:
            return False
        self.rows[key] = row
        self.sides[key] = rank(key, self.seed) < _HELD_OUT_SHARE
        self.held_out_count += self.sides[key]
        return True

    @property
    def train_count(self) -> int:
        return len(self.rows) - self.held_out_count


def question_key(question: str) -> str:
    """What makes two questions the same one: the text without differences in whitespace."""
    return " ".join(question.split())


def rank(key: str, seed: int) -> float:
    """A number in [0, 1) fixed by question and seed alone, whatever the process."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_rows(rows: Sequence[Row], *, train_size: int, eval_size: int, seed: int) -> Split:
    """Rows of a file as training and held-out problems, in an order that `seed` fixes.

    Args:
        rows: each with a `question`; of equal questions the first is kept.
        train_size: most training problems.
        eval_size: held-out problems; at most a third of the different questions.
        seed: chooses the held-out problems.

    Raises:
        InputError: fewer than six different questions.
    """
    different = _different(rows)
    _check_enough(len(different))
    held_out = min(eval_size, len(different) // 3)
    chosen = _in_order(different, seed)
    return Split(chosen[held_out : held_out + train_size], chosen[:held_out], len(different))


def given_split(
    train: Sequence[Row],
    held_out: Sequence[Row],
    *,
    train_size: int,
    eval_size: int,
    seed: int,
    drop: bool = False,
) -> tuple[Split, int]:
    """Two lists of problems as they were given, each in an order that `seed` fixes.

    Args:
        train: each with a `question`; of equal questions the first is kept.
        held_out: likewise.
        drop: leave questions that are in both out of training, in place of refusing them.

    Returns:
        The split, and how many questions were left out of training.

    Raises:
        InputError: questions are in both lists, or one list has none to give.
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
    chosen = _in_order(of_train, seed)[:train_size], _in_order(of_held_out, seed)[:eval_size]
    return Split(*chosen, None), len(shared)


def _different(rows: Sequence[Row]) -> dict[str, Row]:
    different: dict[str, Row] = {}
    for row in rows:
        different.setdefault(question_key(row["question"]), row)
    return different


def _in_order(different: dict[str, Row], seed: int) -> list[Row]:
    return [different[key] for key in sorted(different, key=lambda key: (rank(key, seed), key))]


def draw_split(
    draw: Callable[[int, int], Sequence[Row]], *, train_size: int, eval_size: int, seed: int
) -> Split:
    """Problems of an endless or unknown source as training and held-out problems.

    Each question has its side by a hash, so both sides have the source's own mix, and the held-out
    problems do not depend on `train_size`. A source that stops bringing new questions is taken as it is.

    Args:
        draw: `draw(start, stop)` gives the source's items of these indices.
        train_size: training problems wanted.
        eval_size: held-out problems wanted.
        seed: chooses the sides.

    Raises:
        InputError: fewer than six different questions.
    """
    pool = _Pool(seed)
    drawn = stale = 0
    most = 20 * (train_size + eval_size) + 1000
    batch = int(max(train_size / (1 - _HELD_OUT_SHARE), eval_size / _HELD_OUT_SHARE) * 1.02) + 16
    while drawn < most:
        for row in draw(drawn, drawn + batch):
            stale = 0 if pool.add(row) else stale + 1
            if pool.held_out_count >= eval_size and pool.train_count >= train_size:
                return _two_sides(pool, train_size, eval_size)
            # Among n equally likely questions one is missed by 4n draws with probability e^-4.
            if stale >= max(200, min(4 * len(pool.rows), 4000)):
                return _exhausted(pool, train_size, eval_size)
        drawn += batch
        batch = max(batch // 2, 256)
    return _exhausted(pool, train_size, eval_size)


def _two_sides(pool: _Pool, train_size: int, eval_size: int) -> Split:
    held_out = [row for key, row in pool.rows.items() if pool.sides[key]]
    train = [row for key, row in pool.rows.items() if not pool.sides[key]]
    return Split(train[:train_size], held_out[:eval_size], None)


def _exhausted(pool: _Pool, train_size: int, eval_size: int) -> Split:
    _check_enough(len(pool.rows))
    held_out = min(eval_size, len(pool.rows) // 3)
    preferred = sorted(pool.rows, key=lambda key: not pool.sides[key])
    chosen = set(preferred[:held_out])
    train = [row for key, row in pool.rows.items() if key not in chosen]
    return Split(train[:train_size], [pool.rows[key] for key in preferred[:held_out]], len(pool.rows))


def _check_enough(distinct: int) -> None:
    if distinct < FEWEST_QUESTIONS:
        noun = "question" if distinct == 1 else "questions"
        raise InputError(
            f"the task has only {distinct} different {noun}, and training and held-out problems need at least "
            f"{FEWEST_QUESTIONS} together; give it more problems."
        )
