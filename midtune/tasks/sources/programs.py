"""`tiny-programs`: functions of one line, small enough for a model of 135 million parameters to get some right."""

from __future__ import annotations

import json
import random
from typing import Any

from midtune.tasks.code import call_tests
from midtune.tasks.split import Row, Sizes, Split, draw_split, problem

NAME = "tiny-programs"
_TESTS = 5
# If the prompt ended after the first line, SmolLM2-135M-Instruct would mostly close the block there.
_HEAD = "def f(x):\n    return"
# What is asked for, and the expression that computes it.
_NUMBERS = (
    ("x plus {n}", "x + {n}"),
    ("x minus {n}", "x - {n}"),
    ("{n} minus x", "{n} - x"),
    ("x times {n}", "x * {n}"),
    ("the remainder of x divided by {n}", "x % {n}"),
    ("x divided by {n}, rounded down", "x // {n}"),
    ("the larger of x and {n}", "max(x, {n})"),
    ("the smaller of x and {n}", "min(x, {n})"),
    ("the absolute difference of x and {n}", "abs(x - {n})"),
    ("the square of x, plus {n}", "x ** 2 + {n}"),
    ("True if x is greater than {n}, else False", "x > {n}"),
    ("True if x is divisible by {n}, else False", "x % {n} == 0"),
)
_LISTS = (
    ("the sum of the list x, plus {n}", "sum(x) + {n}"),
    ("the length of the list x, plus {n}", "len(x) + {n}"),
    ("the list x with {n} at its end", "x + [{n}]"),
    ("how often {n} is in the list x", "x.count({n})"),
    ("the largest number of the list x, times {n}", "max(x) * {n}"),
    ("the last number of the list x, minus {n}", "x[-1] - {n}"),
)


def draw_programs(sizes: Sizes) -> Split:
    """Draw problems with the `tests` that the reward `code` reads, and a right program as the answer."""
    return draw_split(lambda start, stop: [example(sizes.seed, n) for n in range(start, stop)], sizes)


def example(seed: int, index: int) -> Row:
    """The problem at an index; its prompt opens the fenced block that a completion ends."""
    rng = random.Random(f"{NAME} {seed} {index}")
    of_list = rng.random() < 1 / 3
    text, expression = rng.choice(_LISTS if of_list else _NUMBERS)
    n = rng.randint(2, 99)
    near = [n, n + 1, n * rng.randint(2, 9)]
    if of_list:
        given: list[Any] = [_numbers(rng, n) for _ in range(_TESTS)]
    else:
        given = near + rng.sample(range(-99, 200), _TESTS - 3)
    question = f"A Python function that returns {text.format(n=n)}:\n\n```python\n{_HEAD}"
    right = f"def right(x): return {expression.format(n=n)}"
    tests = [f"assert f({x!r}) == right({x!r})" for x in given]
    answer = f"{_HEAD} {expression.format(n=n)}\n"
    return problem(question, question, answer, tests=json.dumps(call_tests([right], tests, prefix=_HEAD)))


def _numbers(rng: random.Random, n: int) -> list[int]:
    numbers = rng.sample(range(-99, 200), rng.randint(1, 4)) + [n] * rng.randint(0, 2)
    rng.shuffle(numbers)
    return numbers
