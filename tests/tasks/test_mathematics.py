from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from midtune.errors import MidtuneError
from midtune.tasks.mathematics import Comparer
from midtune.tasks.rewards import per_completion


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    made = Comparer(limit_s=2.0)
    yield made
    made.close()


def test_equal_answers_are_found_however_they_are_written(comparer: Comparer) -> None:
    assert comparer.equal(["$0.5$"], [r"$\frac{1}{2}$"])
    assert comparer.equal(["$x^2-1$"], ["", "$(x-1)(x+1)$"])
    # The first that can be read counts.
    assert not comparer.equal(["$x^2-1$"], ["$3$", "$(x-1)(x+1)$"])
    assert comparer.equal(["", "$7$"], ["7"])
    assert not comparer.equal(["$0.5$"], [r"$\frac{1}{3}$"])
    assert not comparer.equal(["$1$"], [])


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        # What math-verify leaves out: the repeated digits, the base, a name, a relation.
        (r"0.\overline{3}", r"0.\overline{4}"),
        ("120_5", "120_6"),
        ("3c", "3"),
        ("5", "< 5"),
        # Equations that it cannot solve, or that have no solution.
        (r"\frac{dy}{dx} = 2x", r"\frac{dy}{dx} = 3x"),
        ("x^2 + 1 = 0", "x^2 + 2 = 0"),
        # More decimals than it compares by itself.
        ("(1.2345678, 2)", "(1.2345679, 2)"),
    ],
)
def test_what_is_not_read_whole_is_not_equal(comparer: Comparer, reference: str, candidate: str) -> None:
    assert not comparer.equal([f"${reference}$"], [f"${candidate}$"])


def test_equations_and_sets_are_compared() -> None:
    comparer = Comparer(limit_s=30.0)
    assert comparer.equal(["$x^2 + y^2 = 1$"], ["$y^2 + x^2 = 1$"])
    assert comparer.equal(["$2x + 4y - 3 = 0$"], [r"$y = -\frac{1}{2}x + \frac{3}{4}$"])
    assert comparer.equal([r"$(-\infty, 3]$"], [r"$x \le 3$"])
    comparer.close()


def test_an_answer_that_takes_forever_ends_and_the_next_one_is_read(comparer: Comparer) -> None:
    assert comparer.equal(["$2$"], ["$2$"])
    started = time.perf_counter()
    assert not comparer.equal(["$1$"], ["$9^{9^{9^{9}}}$"])
    assert time.perf_counter() - started < 10
    assert comparer.equal(["$2$"], ["$2$"])


def test_threads_share_one_process(comparer: Comparer) -> None:
    found: dict[int, bool] = {}

    def ask(n: int) -> None:
        found[n] = comparer.equal([f"${n}$"], [f"$\\frac{{{2 * n}}}{{2}}$" if n % 2 else "$100$"])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: n % 2 == 1 for n in range(8)}


def test_a_process_that_died_is_begun_anew() -> None:
    comparer = Comparer()
    before = {*psutil.Process().children()}
    assert comparer.equal(["$1$"], ["$1$"])
    (process,) = {*psutil.Process().children()} - before
    process.kill()
    process.wait()
    assert comparer.equal(["$1$"], ["$1$"])
    comparer.close()


def test_one_that_never_starts_is_an_error_and_no_wrong_answer() -> None:
    broken = Comparer(program="/nowhere.py")
    reward = per_completion("math", lambda found, reference, _: broken.equal([reference], [found]))
    with pytest.raises(MidtuneError, match="math-verify does not answer"):
        reward(prompts=["?"], completions=["x"], answer=["y"])
