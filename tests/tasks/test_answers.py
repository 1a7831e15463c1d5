import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midtune.tasks.answers import extract, final_answer, last_boxed, reference_answer, same_answer
from midtune.tasks.notation import normalise


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
    ("text", "expected"),
    [
        (r"$x = \boxed{2}$ or $x = \boxed{3}$.", "2, 3"),
        (r"$\boxed{1}, \boxed{2} \text{ and } \boxed{3}$", "1, 2, 3"),
        (r"\boxed{2}, so again \boxed{3}", "3"),
        (r"\boxed{2} and \boxed{2}", "2"),
        (r"\boxed{1 + \boxed{2}}", "2"),
        (r"\boxed{2}\boxed{3}", "3"),
    ],
)
def test_boxes_that_are_joined_are_one_answer(text: str, expected: str) -> None:
    assert last_boxed(text) == expected


def test_reference_answer_reads_a_worked_solution() -> None:
    assert reference_answer("She has 5 + 3 = 8.\n#### 1,008") == "1008"
    assert reference_answer("Paris, France") == "Paris, France"


@pytest.mark.parametrize(
    "gold", [r"-\frac{1}{8}", r"5\frac{1}{8}", r"\frac{1,000}{3}", "100,400", "+5", "1,234"]
)
def test_reference_answer_is_not_rewritten(gold: str) -> None:
    assert reference_answer(gold) == gold
    assert reference_answer(rf"So $x = \boxed{{{gold}}}$.") == gold


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### Step 1: compute\n6 * 7\n#### Paris", "Paris"),
        ("#### Step 1: compute\nParis", "Paris"),
        ("#### Answer\nParis", "Paris"),
        ("##### Paris", "##### Paris"),
        ("The answer is $Paris$.", "Paris"),
        ("The answer is $$Paris$$", "Paris"),
        ("The answer is St. Louis.", "St. Louis"),
        ("The answer is Paris. It lies on the Seine.", "Paris"),
        ("The answer is No, because 5 is odd.", "No"),
        ("The answer to the question is: **Paris**", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("Answer:\nParis\n\nDone.", "Paris"),
        ("It is the city of **Paris**.", "Paris"),
        ("<answer>The answer is Paris.</answer>", "Paris"),
        (r"<answer>\boxed{Paris}</answer>", "Paris"),
        (r"\boxed {Paris}", "Paris"),
        (r"\fbox{Paris}", "Paris"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
    ],
)
def test_final_answer_finds_what_is_marked_or_stated(text: str, expected: str) -> None:
    assert final_answer(text, "Rome") == expected


@pytest.mark.parametrize(
    ("found", "reference", "expected"),
    [
        ("(B)", "B", True),
        ("B.", "B", True),
        ("Option B", "B", True),
        (r"\textbf{(B)}\ 42", "B", True),
        (r"\textbf{(B)}\ 42", "42", True),
        ("B", r"\textbf{(B)}\ 42", True),
        ("42", r"\textbf{(B)}\ 42", True),
        ("(B) 42", r"\textbf{(C)}\ 42", False),
        ("(B) 43", r"\textbf{(B)}\ 42", False),
        ("C", r"\textbf{(B)}\ 42", False),
        ("A. 5, B. 6", "A", False),
        ("A, C", "C", False),
        ("", "", False),
    ],
)
def test_a_choice_is_its_letter_or_what_it_says(found: str, reference: str, expected: bool) -> None:
    assert same_answer(found, reference, lambda one, other: normalise(one) == normalise(other)) == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(), st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<\\#")))
def test_a_number_at_the_end_is_read_back_after_any_text(number: int, before: str) -> None:
    assert extract(f"{before} = {number}", "7") == str(number)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_extraction_never_fails(text: str, reference: str) -> None:
    assert isinstance(extract(text, reference), str)
    assert isinstance(reference_answer(text), str)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"x = -\boxed{7}", "-7"),
        (r"$x = - \boxed{7}$", "-7"),
        (r"so it is -\boxed{\frac{1}{8}}.", r"-\frac{1}{8}"),
        ("\u2212\\boxed{7}", "-7"),
        (r"- \boxed{7}", "7"),
        (r"$3-\boxed{7}$", "7"),
    ],
)
def test_a_minus_before_a_box_is_part_of_the_answer(text: str, expected: str) -> None:
    assert last_boxed(text) == expected
