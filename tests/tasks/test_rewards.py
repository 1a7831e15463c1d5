import threading

import pytest

from midtune.tasks.rewards import built_in, default_reward
from tests.tasks.golds import GOLDS, rows

ROWS = [{"prompt": "p", "question": f"q{n}", "answer": str(n), "level": n} for n in range(1, 7)]


def score(name: str, text: str, answer: str) -> float:
    return built_in(name)(prompts=["p"], completions=[text], answer=[answer], trainer_state=None)[0]


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        ("exact", "I say\n  PARIS ", "Paris", 1.0),
        ("exact", "Paris, I say", "Paris", 0.0),
        ("exact", "it is 1,234", "1234", 1.0),
        ("exact", "", "Paris", 0.0),
        ("numeric", "= -5", "-5", 1.0),
        ("numeric", "3-5", "-5", 0.0),
        ("numeric", r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("numeric", "12 #### 7", "She has 3 + 4. #### 7", 1.0),
        ("numeric", "", "0", 0.0),
        ("math", r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        ("math", r"so $x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("math", "<answer>0.5</answer>", "1/2", 1.0),
        ("math", r"\boxed{3}", "1/2", 0.0),
        ("math", r"\boxed{9^{9^{9^9}}}", "1/2", 0.0),
        ("math", r"\boxed{\frac{", "1/2", 0.0),
        ("math", "", "1/2", 0.0),
        # Generation began within <think>, which names another answer first.
        ("math", "is it \\boxed{3}? no\n</think>\nIt is $\\frac{1}{2}$.", "1/2", 1.0),
        ("math", "it is \\boxed{\\frac{1}{2}}\n</think>\nIt is 3.", "1/2", 0.0),
        ("exact", "Rome\n</think>\nParis", "Paris", 1.0),
    ],
)
def test_built_in_rewards(name: str, text: str, answer: str, expected: float) -> None:
    assert score(name, text, answer) == expected


@pytest.mark.parametrize(
    ("names", "answer", "text", "expected"),
    [
        ("numeric math", "45", r"\boxed{45^\circ}", 1),
        ("numeric math", "25", r"\boxed{25\text{ cm}^2}", 1),
        ("numeric math", "0.5", r"\boxed{\frac12}", 1),
        ("numeric math", "-5", r"\boxed{- 5}", 1),
        ("numeric math", "5", r"\boxed{(5)}", 1),
        ("numeric math", "42", r"<answer>\boxed{42}</answer>", 1),
        ("numeric math", "300000000", r"\boxed{3 \times 10^8}", 1),
        ("numeric math", "300000000", r"\boxed{3 \times 10^{9}}", 0),
        ("numeric math", "42", r"\boxed{\textbf{(A) } 42}", 1),
        ("numeric math", "42", r"\boxed{\textbf{(A) } 43}", 0),
        ("exact math", "B", r"\boxed{\text{B}}", 1),
        ("exact math", "B", "(B).", 1),
        ("exact math", "B", "**B**", 1),
        ("exact math", "B", "The answer is **(B)**.", 1),
        ("exact math", "B", "The correct answer is (B) Paris.", 1),
        ("exact math", "B", "Answer: B", 1),
        ("exact math", "B", "**Answer:** B", 1),
        ("exact math", "B", "**Answer**: C", 0),
        ("exact math", "B", r"\boxed{\mathbf{B}}", 1),
        ("exact math", "B", r"\boxed{\textbf{(B)}}", 1),
        ("exact math", "B", r"\boxed{\textbf{(C)}\ 3}", 0),
        ("exact math", "B", r"\boxed{B. 42}", 1),
        ("exact math", "B", "b", 1),
        ("exact math", "B", "The correct option is B)", 1),
        ("exact math", "B", "<answer> (B) </answer>", 1),
        ("exact math", "B", r"$\boxed{\text{(B) }42}$", 1),
        ("exact math", "(B)", "B", 1),
        ("exact math", "(B) 42", "42", 1),
        ("exact math", "(B) 42", "C", 0),
        ("numeric math", "42", "So it is **42**.", 1),
        ("numeric math", "42", "The answer is **42**.", 1),
        ("numeric math", "-5", "The answer is −5.", 1),
        ("numeric math", "5", "The answer is −5.", 0),
        ("numeric math", "0.001", "The answer is 1e-3", 1),
        ("numeric math", "42", r"So \boxed {42}", 1),
        ("numeric math", "42", r"So \fbox{42}", 1),
        ("numeric math", "42", "#### Step 1: compute\n6*7\nThe answer is 42.", 1),
        ("numeric math", "42", "#### Answer\n42", 1),
        ("numeric math", "1", "#### Step 1: compute\nThe answer is 42.", 0),
        ("numeric math", "1", "#### Step 1", 0),
        ("numeric math", "42", "#### 42", 1),
        ("numeric math", "42", "#### **42**", 1),
        ("numeric math", "42", "#### Answer: 42", 1),
        ("numeric math", "42", "#### Final Answer\n\n\\boxed{42}", 1),
        ("numeric math", "2", "#### 2\nThe answer is 42.", 0),
        ("numeric math exact", r"-\frac{1}{8}", r"\boxed{-\frac{1}{8}}", 1),
        ("numeric math exact", r"-\frac{1}{8}", r"\boxed{\frac{1}{8}}", 0),
        ("numeric math exact", r"-\frac{1}{8}", "-1/8", 1),
        ("numeric math", r"-\frac{1}{8}", r"\boxed{-0.125}", 1),
        ("numeric math", r"-\frac{1}{8}", r"\boxed{\frac{-1}{8}}", 1),
        ("numeric math", r"-\frac{1}{8}", r"so $x = -\frac{1}{8}$", 1),
        ("numeric math", r"-\frac{1}{8}", r"\boxed{x = -\frac{1}{8}}", 1),
        ("numeric math", r"-\frac{1}{8}", r"\boxed{0.125}", 0),
        ("numeric math", r"5\frac{1}{8}", r"\boxed{5\frac{1}{8}}", 1),
        ("numeric math", r"5\frac{1}{8}", r"\boxed{5.125}", 1),
        ("numeric math", r"5\frac{1}{8}", r"\boxed{\frac{41}{8}}", 1),
        ("numeric math", r"5\frac{1}{8}", r"\boxed{\frac{1}{8}}", 0),
        ("numeric math", r"5\frac{1}{8}", "5 1/8", 1),
        ("numeric math", r"5\frac{1}{8}", r"\boxed{5 \text{ and } \frac18}", 1),
        ("numeric math", "6.375", r"\boxed{5\frac{1}{8}}", 0),
        ("numeric math", r"\frac{1,000}{3}", r"\boxed{\frac{1000}{3}}", 1),
        ("numeric math", r"\frac{1,000}{3}", r"\boxed{\frac{1,000}{3}}", 1),
        ("numeric math", r"\frac{1,000}{3}", "1000/3", 1),
        ("numeric math", r"\frac{1,000}{3}", r"\boxed{333.333}", 1),
        ("numeric math exact", "100,400", r"\boxed{100,400}", 1),
        ("numeric math exact", "100,400", r"\boxed{100, 400}", 1),
        ("numeric math exact", "100,400", r"\boxed{100400}", 0),
        ("numeric math exact", "1,234", r"\boxed{1234}", 1),
        ("numeric math exact", "1234", r"\boxed{1,234}", 1),
        ("numeric math exact", "145600", r"\boxed{145,600}", 1),
        ("numeric math exact", "1234", r"\boxed{1{,}234}", 1),
        ("numeric math exact", "1234", r"\boxed{1\,234}", 1),
        ("numeric math exact", "1234", r"\boxed{1,\!234}", 1),
        ("numeric math exact", "1234", r"\boxed{1, 234}", 0),
        ("numeric math", "235", r"\boxed{1\,234}", 0),
        ("numeric math", "5", r"\boxed{5x}", 0),
        ("numeric math", "5", r"\boxed{5i}", 0),
        ("numeric math", "5", r"\boxed{5\pi}", 0),
        ("numeric math", "5", r"\boxed{5!}", 0),
        ("numeric math", "5", r"\boxed{5 \text{ million}}", 0),
        ("numeric math", "5", r"\boxed{< 5}", 0),
        ("numeric math", "5", r"\boxed{x > 5}", 0),
        ("numeric math", "5", r"\boxed{x \neq 5}", 0),
        ("numeric math", "5", r"\boxed{x \geq 5}", 0),
        ("numeric math", "5", r"\boxed{x = 5 \text{ or } x = 6}", 0),
        ("numeric math", "6", r"\boxed{x = 5 \text{ or } x = 6}", 0),
        ("numeric math", "6", r"\boxed{5, 6}", 0),
        ("numeric math", "2", r"\boxed{3:2}", 0),
        ("numeric math", "5", r"\boxed{\pm 5}", 0),
        ("numeric math", "5", r"\boxed{\text{not } 5}", 0),
        ("numeric math", "120", r"\boxed{120_5}", 0),
        ("math", "120_5", r"\boxed{120}", 0),
        ("math", "120_5", r"\boxed{120_{5}}", 1),
        ("numeric math", "0", r"\boxed{0.\overline{3}}", 0),
        ("math", r"0.\overline{3}", r"\boxed{\frac{1}{3}}", 1),
        ("math", r"\frac{1}{3}", r"\boxed{0.\overline{3}}", 1),
        ("numeric math", "3", r"\boxed{3c}", 0),
        ("math", "3c", r"\boxed{3}", 0),
        ("numeric math", r"50\%", r"\boxed{0.5}", 1),
        ("numeric math", r"50\%", r"\boxed{50}", 1),
        ("numeric math", "0.5", r"\boxed{50\%}", 1),
        ("numeric math", "18", "She pays $18.", 1),
        ("numeric math", "18", r"\boxed{\$18}", 1),
        ("numeric math", "18", r"\boxed{\$18.00}", 1),
        ("numeric math", "18", r"\boxed{18 \text{ dollars}}", 1),
        ("numeric math", "1/3", r"\boxed{0.333333}", 1),
        ("numeric math", "1/3", r"\boxed{0.333}", 0),
        ("numeric math", "7", "007", 1),
        ("numeric math", "007", r"\boxed{7}", 1),
        ("numeric math", "007", r"\boxed{70}", 0),
        ("math", "x = 5", r"\boxed{5}", 1),
        ("math", "5", r"\boxed{x = 5}", 1),
        ("math", "x = 5", r"\boxed{y = 5}", 0),
        ("math", r"x \in [1,2]", r"\boxed{[1,2]}", 1),
        ("math", "[1,2]", r"\boxed{x \in [1,2]}", 1),
        ("math", "[1,2]", r"\boxed{1 \le x \le 2}", 1),
        ("math", "(1,2)", r"\boxed{[1,2]}", 0),
        ("math", "(1,2)", r"\boxed{(2,1)}", 0),
        ("math", "(1,2)", r"\boxed{(1, 2)}", 1),
        ("math", "1,2", r"\boxed{2, 1}", 1),
        ("math", "1, 2", r"\boxed{1 \text{ and } 2}", 1),
        ("math", r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("math", "1", r"\boxed{1,2}", 0),
        ("math", r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1),
        ("math", "(x-1)(x+2)", r"\boxed{x^2+x-2}", 1),
        ("math", r"\text{Evelyn}", r"\boxed{Evelyn}", 1),
        ("math", r"\text{Evelyn}", "Evelyn", 1),
        ("math", "Paris", "pairs", 0),
        ("math", "Paris", "The answer is Paris.", 1),
        ("math", r"2\pi", "The answer is 2π.", 1),
        ("math", r"2\pi", "so it is **2π**", 1),
        ("math", r"2\pi", r"so it is $2\pi$", 1),
        ("math", r"2\pi", r"\boxed{2π}", 1),
        ("math", r"\sqrt{2}", r"\boxed{√2}", 1),
        ("math", "x^2+1", r"\boxed{x²+1}", 1),
        ("math", r"\frac{1}{2}", r"\boxed{½}", 1),
        ("math", r"5\frac{1}{2}", r"\boxed{5½}", 1),
        ("math", "x^2+1", "the answer is $x^2+1$ because of it", 1),
        ("math", "x^2+1", "We get $x^2+1$.", 1),
        ("math", "x^2+1", "We get **x^2+1**.", 1),
        ("exact math", "2024-01-05", r"\boxed{2024-02-04}", 0),
        ("exact math", "12:30", r"\boxed{12:30}", 1),
        ("exact math", "[1, 2, 3]", "<answer>[1,2,3]</answer>", 1),
        ("exact math", "True", r"\boxed{\text{True}}", 1),
        ("exact math", "New York", "The answer is **New York**.", 1),
        ("exact math", "No", "The answer is No, because 5 is odd.", 1),
        ("numeric math", "72", "The final answer is $72$. I hope it is correct.", 1),
        ("numeric math", "72", r"Therefore the answer is: $\boxed{72}$.", 1),
        ("numeric math", "72", "The answer is 72 apples.", 1),
        ("numeric math", "72", "Answer: 72 km/h", 1),
        ("numeric math", "72", "The answer is not obvious.\nSo we get 72.", 1),
        ("numeric math", "1", "The answer is $x + 1$.", 0),
        ("numeric math", "5", "So we get $2^5$", 0),
        ("math", "2^{10}", r"\boxed{1024}", 1),
        ("math", "1024", r"\boxed{2^{10}}", 1),
        ("math", r"\textbf{(B)}\ 42", r"\boxed{B}", 1),
        ("math", r"\textbf{(B)}\ 42", r"\boxed{42}", 1),
        ("math", r"\textbf{(B)}\ 42", r"\boxed{\text{(C) }42}", 0),
        ("math", r"\textbf{(B)}\ \frac{1}{2}", r"\boxed{0.5}", 1),
        ("math", r"25\text{ cm}^2", r"\boxed{25}", 1),
        ("math", r"25\text{ cm}^2", r"\boxed{25 cm²}", 1),
        ("math", r"25\text{ cm}^2", r"\boxed{25 \text{ square centimeters}}", 1),
        ("math", r"25\text{ cm}^2", r"\boxed{25 \text{ m}^2}", 0),
        ("math", r"25\pi\text{ cm}^2", r"\boxed{25\pi}", 1),
        ("math", r"8:30\text{ a.m.}", r"\boxed{8:30 a.m.}", 1),
        ("math", r"8:30\text{ a.m.}", r"\boxed{8:30 am}", 1),
        ("math", "(100,400)", r"\boxed{(100, 400)}", 1),
        ("math", "(100,400)", r"\boxed{100400}", 0),
        ("math", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}}", 1),
        ("math", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", 0),
        ("math", "y = 2x + 3", r"\boxed{2x+3}", 1),
        ("math", r"3\sqrt{2}", r"\boxed{\sqrt{18}}", 1),
        ("math", r"1 \pm \sqrt{2}", r"\boxed{1+\sqrt{2}, 1-\sqrt{2}}", 1),
        ("math", r"(-\infty, 3]", r"\boxed{x \le 3}", 1),
        ("math", r"x \le 3", r"\boxed{(-\infty, 3]}", 1),
        ("math", r"\frac{1}{2}", "<answer>1/2</answer>", 1),
        ("math", r"90^\circ", r"\boxed{90 \text{ degrees}}", 1),
        ("math", r"90^\circ", r"\boxed{90}", 1),
        ("math", r"\dfrac{3}{4}", r"The answer is \(\frac{3}{4}\).", 1),
        ("math", r"\dfrac{3}{4}", r"Answer: \[\frac{3}{4}\]", 1),
        ("math", "1{,}5", r"\boxed{1{,}5}", 1),
        ("numeric math", "5", "So it is negative 5.", 0),
        ("numeric math", "5", "So it is not 5.", 0),
        ("numeric math", "5", r"\boxed{5 \text{ and a half}}", 0),
        ("numeric math", "5", r"\boxed{\text{negative } 5}", 0),
        ("numeric math", "5", r"\boxed{5 \text{ hundred}}", 0),
        ("numeric math", "5", r"\boxed{5\text{ halves}}", 0),
        ("numeric math", "5", r"\boxed{5k}", 0),
        ("numeric math", "5", r"\boxed{5a+b}", 0),
        ("numeric math", "5", r"\boxed{a+5}", 0),
        ("numeric math", "5", r"\boxed{5/7}", 0),
        ("numeric math", "5", r"\boxed{5:7}", 0),
        ("numeric math", "5", r"\boxed{5;7}", 0),
        ("numeric math", "5", r"\boxed{5\ 7}", 0),
        ("numeric math", "5", r"\boxed{[5,7]}", 0),
        ("numeric math", "5", r"\boxed{(5,7)}", 0),
        ("numeric math", "5", r"\boxed{5^\circ 30'}", 0),
        ("numeric math", "5", r"\boxed{5 \text{ ft } 3 \text{ in}}", 0),
        ("numeric math", "5", r"\boxed{5\frac{1}{2}}", 0),
        ("numeric math", "5", r"\boxed{5.5}", 0),
        ("numeric math", "5", r"\boxed{5 \bmod 7}", 0),
        ("numeric math", "5", r"\boxed{5 \cdot 7}", 0),
        ("numeric math", "5", r"\boxed{5 \times 10^2}", 0),
        ("numeric math", "5", r"\boxed{5_{8}}", 0),
        ("numeric math", "5", r"\boxed{5\sqrt{2}}", 0),
        ("numeric math", "5", r"\boxed{\log 5}", 0),
        ("numeric math", "5", r"\boxed{\emptyset}", 0),
        ("numeric math", "5", r"\boxed{\text{five}}", 0),
        ("numeric math", "5", r"\boxed{x^5}", 0),
        ("numeric math", "5", r"\boxed{x_5}", 0),
        ("numeric math", "5", r"\boxed{5 < x}", 0),
        ("numeric math", "5", r"\boxed{\leq 5}", 0),
        ("numeric math", "5", r"\boxed{\ge 5}", 0),
        ("numeric math", "5", r"\boxed{\text{at least } 5}", 0),
        ("numeric math", "5", r"\boxed{\text{more than } 5}", 0),
        ("numeric math", "5", r"\boxed{5+}", 0),
        ("numeric math", "5", r"\boxed{5 \text{ or more}}", 0),
        ("numeric math", "5", r"\boxed{\text{none of these}}", 0),
        ("math", r"\frac{1}{3}", r"\boxed{0.33}", 0),
        ("math", r"\sqrt{2}", r"\boxed{1.41}", 0),
        ("math", r"\pi", r"\boxed{3.14}", 0),
        ("math", r"2\pi", r"\boxed{6.28}", 0),
        ("math", "(1,2]", r"\boxed{[1,2)}", 0),
        ("math", r"\{1,2\}", r"\boxed{1}", 0),
        ("math", r"\{1,2\}", r"\boxed{\{1,2,3\}}", 0),
        ("math", "x>5", r"\boxed{x\ge 5}", 0),
        ("math", "x>5", r"\boxed{5}", 0),
        ("math", "x>5", r"\boxed{x<5}", 0),
        ("math", "x=5", r"\boxed{x>5}", 0),
        ("math", "[1,2]", r"\boxed{1,2}", 0),
        ("math", r"(1,2) \cup (3,4)", r"\boxed{(1,2)}", 0),
        ("math", r"(1,2) \cup (3,4)", r"\boxed{(3,4) \cup (1,2)}", 1),
        ("math", "x^2", r"\boxed{y^2}", 0),
        ("math", "ab", r"\boxed{ba}", 0),
        ("math", r"\text{Alice}", r"\boxed{\text{Celia}}", 0),
        ("math", "i", r"\boxed{-i}", 0),
        ("math", "3+4i", r"\boxed{4i+3}", 1),
        ("math", "e^{x}", r"\boxed{e^{-x}}", 0),
        ("math", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&3\\2&4\end{pmatrix}}", 0),
        ("math", "10^{-3}", r"\boxed{0.001}", 1),
        ("math", "10^{-7}", r"\boxed{2 \times 10^{-7}}", 0),
        ("math", r"\frac{1}{10000000}", r"\boxed{\frac{1}{20000000}}", 0),
        ("math", r"\frac{\pi}{10000000}", r"\boxed{\frac{\pi}{20000000}}", 0),
        ("math", "10^{-8}x", r"\boxed{10^{-9}x}", 0),
        ("math", r"0.00000012 \pi", r"\boxed{0.00000013\pi}", 0),
        ("math", r"\sqrt{0.0000000001}", r"\boxed{\sqrt{0.0000000002}}", 0),
    ],
)
def test_an_answer_counts_however_it_is_written(names: str, answer: str, text: str, expected: int) -> None:
    assert {name: score(name, text, answer) for name in names.split()} == dict.fromkeys(
        names.split(), float(expected)
    )


DRESSED = (r"\boxed{%s}", "The answer is $%s$.", "<answer>%s</answer>")


@pytest.mark.parametrize("name", ["default", "math"])
@pytest.mark.parametrize("column", GOLDS)
def test_golds_of_data_sets_score_1_and_what_differs_from_them_0(column: str, name: str) -> None:
    found = rows(column)
    default = default_reward([answer for answer, _, _ in found])
    reward = built_in(default if name == "default" else name)
    dressed = [(form, *row) for row in found for form in DRESSED]
    answers = [answer for _, answer, _, _ in dressed]
    for texts, expected in (
        ([form.replace("%s", gold) for form, _, gold, _ in dressed], 1.0),
        ([form.replace("%s", wrong) for form, _, _, wrong in dressed], 0.0),
    ):
        scores = reward(prompts=["p"] * len(texts), completions=texts, answer=answers)
        assert [(text, score) for text, score in zip(texts, scores, strict=True) if score != expected] == []


def test_a_sign_or_digit_that_is_changed_anywhere_scores_0() -> None:
    for column in GOLDS:
        found = rows(column)
        reward = built_in(default_reward([answer for answer, _, _ in found]))
        changed = [(answer, other) for answer, gold, _ in found for other in others(gold)]
        texts = [rf"\boxed{{{other}}}" for _, other in changed]
        answers = [answer for answer, _ in changed]
        scores = reward(prompts=["p"] * len(texts), completions=texts, answer=answers)
        assert [text for text, score in zip(texts, scores, strict=True) if score] == []


def others(gold: str) -> list[str]:
    """The gold with its sign changed, and with its first and its last digit."""
    places = [place for place, char in enumerate(gold) if char.isdecimal()]
    changed = [gold[:place] + str((int(gold[place]) + 1) % 10) + gold[place + 1 :] for place in places]
    negative = gold.removeprefix("-") if gold.startswith("-") else "-" + gold
    zero_or_minus = not gold.strip("0") or gold.startswith("\u2212")
    return [*([] if zero_or_minus else [negative]), *changed[:1], *changed[1:][-1:]]


def test_there_are_enough_golds() -> None:
    assert sum(map(len, GOLDS.values())) >= 150


def test_math_works_outside_the_main_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(score("math", r"\boxed{0.75}", r"\frac{3}{4}")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_the_default_reward_is_numeric_only_if_all_answers_are_numbers() -> None:
    assert default_reward(["1", "-2.5", "so #### 3"]) == "numeric"
    assert default_reward(["1", "two"]) == "exact"
    assert default_reward(["1", r"x = \boxed{\sqrt{2}}"]) == "math"
