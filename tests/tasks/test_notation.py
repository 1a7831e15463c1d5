from __future__ import annotations

import pytest

from midtune.tasks.notation import is_text, normalise, parse_number, same_number, units_differ


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
        ("- 5", -5.0),
        ("\u22125", -5.0),
        ("-$4", -4.0),
        ("(5)", 5.0),
        ("1e-3", 0.001),
        (r"3 \times 10^{8}", 3e8),
        (r"-\frac{1}{8}", -0.125),
        (r"\frac{-1}{8}", -0.125),
        (r"\frac12", 0.5),
        (r"\dfrac{1,000}{4}", 250.0),
        (r"5\frac{1}{8}", 5.125),
        (r"-5 \frac{1}{8}", -5.125),
        ("5 1/8", 5.125),
        ("5\u00bd", 5.5),
        ("5 9/8", None),
        (r"0.1\overline{6}", 1 / 6),
        (r"1e9.\overline{3}", None),
        (r"1{,}234", 1234.0),
        (r"1,\!234", 1234.0),
        (r"1\,234", 1234.0),
        ("1, 234", None),
        (r"45^\circ", 45.0),
        (r"25\text{ cm}^2", None),
        ("5x", None),
        ("5!", None),
        (r"5\pi", None),
        ("5 million", None),
        ("3:2", None),
        ("2024-01-05", None),
        ("9" * 5000, None),
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
    # One number rounds the other, in six digits at least.
    assert same_number("333.333", r"\frac{1,000}{3}")
    assert not same_number("0.123456788", "0.123456789")
    assert not same_number("123456789012345678901", "123456789012345678902")
    assert same_number("0.3", "0.30000000000000004")


@pytest.mark.parametrize(
    ("found", "reference", "expected"),
    [
        ("x = 5", "5", True),
        ("5 + 3 = 8", "8", True),
        (r"\textbf{(A) } 42", "42", True),
        ("She has 12 apples", "12", True),
        ("x > 5", "5", False),
        ("not 5", "5", False),
        ("5 and a half", "5", False),
        ("5 halves", "5", False),
        ("x = 5 or x = 6", "6", False),
        (r"\pm 5", "5", False),
        ("50", r"50\%", True),
        ("0.5", r"50\%", True),
        ("28/100", "28", False),
        (r"25\text{ cm}^2", "25", True),
        (r"25\text{ square centimeters}", r"25\text{ cm}^2", True),
        (r"25\text{ m}^2", r"25\text{ cm}^2", False),
        ("10 pm", "10 am", False),
        ("12%", "12 inches", False),
        ("100,400", "100400", True),
        ("100, 400", "100,400", True),
        ("100400", "100,400", False),
        ("100400", "$100,400", True),
    ],
)
def test_same_number(found: str, reference: str, expected: bool) -> None:
    assert same_number(found, reference) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"**\text{New  York}**.", "new york"),
        (r"\left( 1,\ 2 \right)", "(1,2)"),
        (r"$x^{2} = \dfrac12$", r"x^2=\frac{1}{2}"),
        ("[1, 2,\n3]", "[1,2,3]"),
        ('["a", "b"]', "['a','b']"),
        ("1 2\n3 4", "1 2 3 4"),
        ("8:30 a.m.", "8:30 am"),
        ("(B).", "b"),
        ("-3*x**2 + 2*x", "-3*x**2+2*x"),
    ],
)
def test_normalise_leaves_what_an_answer_says(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_is_text_tells_words_dates_and_times_from_expressions() -> None:
    texts = [
        "Paris",
        r"\text{even}",
        "New York",
        "ABD",
        "2024-01-05",
        "12/25/2023",
        "12:30",
        "1:2:3",
        "0b101",
        "1 2 3",
    ]
    texts += ["100,400", r"5\text{ million}", r"x \text{ is even}", "4 July"]
    expressions = [
        r"\frac{1}{2}",
        "2x+3",
        "2ab",
        r"x = 2 \text{ or } x = 3",
        r"25\pi\text{ cm}^2",
        r"\sin 2x",
    ]
    expressions += [r"\log_2 3", "3:2", r"\begin{pmatrix} 1 \\\\ 2 \end{pmatrix}", "x", r"2-\text{i}"]
    assert [text for text in texts if not is_text(text)] == []
    assert [text for text in expressions if is_text(text)] == []


def test_units_in_latex_differ() -> None:
    assert units_differ(r"25\pi\text{ cm}^2", r"25\pi\text{ cm}^3")
    assert not units_differ(r"25\pi\text{ cm}^2", r"25\pi")
    assert not units_differ(r"5\sqrt{2}\text{ meters}", r"5\sqrt{2}\mathrm{~m}")
