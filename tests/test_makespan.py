"""The simulated sweep of recipes/results on cases worked out by hand."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from tests.scripts import RESULTS, read_script

FOLDER = RESULTS / "cluster"
sim = read_script("cluster/makespan")


def trials(*steps: int) -> list[Any]:
    """Steps of one second, two seconds to load and one to score."""
    return [sim.Trial(count, 1.0, 2.0, 1.0) for count in steps]


def of(lives: list[float], work: list[Any], cards: int, **how: Any) -> tuple[float, int]:
    """The makespan on cards that live as long as `lives` says, one after the other, and then for ever."""
    left = iter(lives)
    found: tuple[float, int] = sim.makespan(
        work, cards, lambda: next(left, math.inf), **{"every": 4, "repair_s": 5.0, **how}
    )
    return found


def test_without_failures_a_free_card_takes_what_has_waited_longest() -> None:
    # 10, 7, 5 and 5 seconds on two cards: 10 | 7 5, then 10 5.
    work = trials(7, 4, 2, 2)
    assert of([], work, 2) == (15, 0)
    assert sim.bound(work, 2) == 13.5
    assert sim.bound(trials(20, 1), 2) == 23


@pytest.mark.parametrize(
    ("every", "end"),
    [
        # Card 0 fails at 9, after 7 steps of 10. Card 1 is free since 5 and goes on from step 4: 2 + 6 + 1.
        (4, 18),
        (7, 15),
        # Without checkpoints all 13 seconds again.
        (None, 22),
    ],
)
def test_a_lost_trial_goes_on_from_its_checkpoint_on_another_card(every: int | None, end: float) -> None:
    assert of([9.0], trials(10, 2), 2, every=every) == (end, 1)


def test_a_single_card_is_repaired_first() -> None:
    # Fails at 9, is back at 14, from step 4: 14 + 9.
    assert of([9.0], trials(10), 1) == (23, 1)
    # Lost at 12.5 while it is scored: all steps are kept, and 17.5 + 2 + 1 is left.
    assert of([12.5], trials(10), 1) == (20.5, 1)
    # Lost while it loads again keeps what was kept: 9, 14 to 15 lost, 20 + 9.
    assert of([9.0, 1.0], trials(10), 1) == (29, 2)


def test_what_failed_while_idle_is_repaired_before_it_takes_work() -> None:
    # Card 1 ends its 3 seconds, and fails at 7, idle; card 0 fails at 9 after 7 steps, of which 4 are kept. Card 1 is
    # back first, at 12, and needs 9.
    assert of([9.0, 7.0], trials(10, 0), 2) == (21, 1)


def test_no_makespan_is_below_the_bound() -> None:
    random.seed(1)
    for _ in range(50):
        work = trials(*(random.randrange(1, 40) for _ in range(30)))
        lost = sim.makespan(work, 4, lambda: random.expovariate(1 / 60), every=4, repair_s=5.0)
        whole = sim.makespan(work, 4, lambda: math.inf, every=4, repair_s=5.0)
        assert whole[1] == 0 and lost[1] > 0
        # A failure changes the order, and another order may be a better one.
        assert sim.bound(work, 4) <= min(whole[0], lost[0])
        # Graham's bound for list scheduling.
        assert whole[0] <= (2 - 1 / 4) * sim.bound(work, 4)


def test_the_figures_on_file_come_from_it() -> None:
    found = json.loads((FOLDER / "qwen3-32b.json").read_text())
    never, *failing = found["simulated"]
    assert (found["cards"], found["trials"], never["lost"]) == (64, 192, 0)
    work, _ = sim.sweep_of("qwen3-32b", "H100", steps=100, seeds=3)
    assert sim.bound(work, 64) == pytest.approx(found["bound_s"])
    assert sim.makespan(work, 64, lambda: math.inf, every=50, repair_s=600)[0] == pytest.approx(
        never["mean_s"]
    )
    assert all(row["of_bound"] > never["of_bound"] > 1 for row in failing)
