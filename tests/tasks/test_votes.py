from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midtune.tasks.answers import majority

# No two of them agree.
DIFFERENT = ["1", "2", "-2", "3/4", "Paris", "paris 7", "1 2\n3 4", ""]
ANSWERS = st.sampled_from(DIFFERENT)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7"], 0),
        (["3", "7", "7"], 1),
        # Two votes each: 3 came first, though 7 had two first.
        (["3", "7", "7", "3"], 0),
        # One vote each.
        (["3", "7", "5"], 0),
        # 0.75 in three ways against 2 in two.
        (["2", "0.75", "2.0", "3/4", ".750"], 1),
        (["1,234", "12", "1234.0"], 0),
        # Whole numbers are compared exactly.
        (["10000000001", "10000000000", "10,000,000,000"], 1),
        (["Rome", "Paris", " paris\n"], 1),
        (["1 2\n3 4", "1 2\n4 3", "1  2\n4 3"], 1),
        # x is no number, and no vote for 5 either.
        (["x", "5", "x = 5", "X"], 0),
        # Blank answers have no vote, even if they are many.
        (["", "", "7", " \n"], 2),
        (["", " "], 0),
        ([], None),
    ],
)
def test_the_winner(answers: list[str], winner: int | None) -> None:
    assert majority(answers) == winner


@settings(deadline=None)
@given(ANSWERS, st.integers(min_value=1, max_value=9))
def test_of_equal_answers_the_first_wins(answer: str, count: int) -> None:
    assert majority([answer] * count) == 0


@settings(deadline=None)
@given(st.data())
def test_the_order_does_not_change_what_more_than_half_say(data: st.DataObject) -> None:
    most = data.draw(st.sampled_from([answer for answer in DIFFERENT if answer]))
    others = data.draw(st.lists(ANSWERS, max_size=6))
    answers = data.draw(st.permutations([most] * (len(others) + 1) + others))
    assert majority(answers) == answers.index(most)


@settings(deadline=None)
@given(st.lists(ANSWERS, max_size=9))
def test_blank_answers_do_not_change_what_wins(answers: list[str]) -> None:
    voting = [answer for answer in answers if answer]
    winner, without_blanks = majority(answers), majority(voting)
    if without_blanks is not None:
        assert winner is not None
        assert answers[winner] == voting[without_blanks]
