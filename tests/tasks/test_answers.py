import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midtune.tasks.answers import extract, last_boxed, parse_number, reference_answer, same_number


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("so <answer> 12 </answer> done 99", "3", "12"),
        ("<answer>1</answer> no: <ANSWER>2</ANSWER>", "3", "2"),
        ("<answer>12 or \\boxed{7}", "3", "7"),
        ("<answer>4</answer> \\boxed{5} #### 6", "3", "4"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} #### 9", "x", r"\frac{1}{2}"),
        ("work #### 1\nmore #### 1,234\n", "3", "1234"),
        ("work #### 1\nbye 7", "3", "7"),
        ("The total is 1,234 apples.", "3", "1234"),
        ("3-5", "3", "5"),
        ("3 - 5", "3", "5"),
        ("x-5", "3", "5"),
        ("= -5", "3", "-5"),
        ("=-5", "3", "-5"),
        ("\u22125", "3", "-5"),
        ("$-5", "3", "-5"),
        ("-$5.50", "3", "-5.50"),
        ("10\u201320", "3", "20"),
        ("the list 1,2,3", "3", "3"),
        ("about 3/4.", "0.5", "3/4"),
        (r"it is \frac{3}{4}", "0.5", "3/4"),
        ("**12**", "3", "12"),
        ("1.5e-3", "3", "1.5e-3"),
        ("no number", "3", ""),
        ("", "3", ""),
        ("is it \\boxed{3}? <answer>3</answer> no\n</think>\nIt is 4.", "3", "4"),
        ("<think>3</think>\n\\boxed{4}", "3", "4"),
        ("so it is 3</think>", "3", ""),
        ("so it is 3", "3", "3"),
        ("", "Paris", ""),
        ("I think\n Paris \n\n", "Rome", "Paris"),
        ("grid:\n1 2\n3 4\n", "5 6\n7 8", "1 2\n3 4"),
        ("<answer>x = 5</answer>", "3", "5"),
        ("<answer>5 + 3 = 8</answer>", "3", "8"),
        (r"\boxed{12\text{ cm}}", "3", "12"),
        (r"\boxed{2^{3}}", "3", "2^{3}"),
        (r"\boxed{\sqrt{2}}", "2", r"\sqrt{2}"),
        (r"\boxed{\frac{1}{2}}", "2", "1/2"),
    ],
)
def test_extract_follows_the_order_of_markers(text: str, reference: str, expected: str) -> None:
    assert extract(text, reference) == expected


def test_last_boxed_skips_an_unclosed_box() -> None:
    assert last_boxed(r"\boxed{a{b}c} and \boxed{never") == "a{b}c"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-5", -5.0),
        ("+5", 5.0),
        ("1,234.50", 1234.5),
        ("$3", 3.0),
        ("50%", 50.0),
        ("3/4", 0.75),
        ("12.", 12.0),
        (".5", 0.5),
        ("1/0", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("3 apples", None),
        ("3-5", None),
        ("", None),
    ],
)
def test_parse_number(text: str, value: float | None) -> None:
    assert parse_number(text) == value


def test_same_number_is_exact_for_whole_numbers_and_relative_for_others() -> None:
    assert same_number("1,234", "1234.0")
    assert same_number("3/4", "0.75")
    assert same_number("0.3333333", "0.33333331")
    assert not same_number("0.3333", "0.3333333")
    assert not same_number("12345678", "12345679")
    assert not same_number("", "0")


def test_reference_answer_reads_a_worked_solution() -> None:
    assert reference_answer("She has 5 + 3 = 8.\n#### 1,008") == "1008"
    assert reference_answer("Paris, France") == "Paris, France"


@settings(max_examples=50, deadline=None)
@given(st.integers(), st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<\\#")))
def test_a_number_at_the_end_is_read_back_after_any_text(number: int, before: str) -> None:
    assert extract(f"{before} = {number}", "7") == str(number)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_extraction_never_fails(text: str, reference: str) -> None:
    assert isinstance(extract(text, reference), str)
    assert isinstance(reference_answer(text), str)
