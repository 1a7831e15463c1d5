import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midtune.errors import InputError
from midtune.tasks.split import Row, Sizes, draw_split, question_key, split_rows


def rows(count: int, start: int = 0) -> list[Row]:
    return [{"question": f"q{number}", "answer": str(number)} for number in range(start, start + count)]


def questions(split_side: list[Row]) -> set[str]:
    return {question_key(row["question"]) for row in split_side}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=60),
    st.integers(1, 40),
    st.integers(2, 20),
    st.integers(0, 5),
)
def test_training_and_held_out_never_share_a_question(
    texts: list[str], train_size: int, eval_size: int, seed: int
) -> None:
    given_rows = [{"question": text} for text in texts]
    distinct = len({question_key(text) for text in texts})
    if distinct < 6:
        with pytest.raises(InputError, match=f"only {distinct} different"):
            split_rows(given_rows, Sizes(train_size, eval_size, seed))
        return
    split = split_rows(given_rows, Sizes(train_size, eval_size, seed))
    assert not questions(split.train) & questions(split.held_out)
    assert len(split.held_out) == len(questions(split.held_out)) == min(eval_size, distinct // 3)
    assert len(split.train) == len(questions(split.train)) == min(train_size, distinct - len(split.held_out))


def test_held_out_depends_on_the_seed_and_not_on_the_training_size() -> None:
    first = split_rows(rows(100), Sizes(10, 20, 0))
    assert first.held_out == split_rows(rows(100), Sizes(80, 20, 0)).held_out
    assert first.held_out != split_rows(rows(100), Sizes(10, 20, 1)).held_out


def test_an_endless_source_fills_both_sides() -> None:
    def draw(start: int, stop: int) -> list[Row]:
        return rows(stop - start, start)

    small = draw_split(draw, Sizes(30, 20, 3))
    large = draw_split(draw, Sizes(300, 20, 3))
    assert (len(small.train), len(small.held_out), small.distinct) == (30, 20, None)
    assert large.held_out == small.held_out
    assert not questions(large.train) & questions(large.held_out)


def test_a_small_source_is_taken_whole_and_keeps_two_thirds_for_training() -> None:
    def draw(start: int, stop: int) -> list[Row]:
        return [{"question": f"q{index % 30}"} for index in range(start, stop)]

    split = draw_split(draw, Sizes(4000, 300, 0))
    assert (len(split.train), len(split.held_out), split.distinct) == (20, 10, 30)
    assert not questions(split.train) & questions(split.held_out)
    with pytest.raises(InputError, match="only 1 different question,"):
        draw_split(lambda start, stop: [{"question": "q"}] * (stop - start), Sizes(9, 2, 0))


def test_the_split_is_the_same_in_another_process() -> None:
    code = (
        "from midtune.tasks.split import Sizes, split_rows\n"
        "rows = [{'question': f'q{n}'} for n in range(12)]\n"
        "print([r['question'] for r in split_rows(rows, Sizes(9, 3, 0)).held_out])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {str([r["question"] for r in split_rows(rows(12), Sizes(9, 3, 0)).held_out]) + "\n"}
