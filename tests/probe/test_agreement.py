import math

import numpy as np
import pytest

from midtune.probe.agreement import (
    Correlation,
    at_relative_depths,
    depth_correlation,
    kendall,
    middle_correlation,
    spearman,
    top_overlap,
)
from tests.probe.curves import PUBLISHED

BACKWARDS = [-value for value in PUBLISHED]


def test_worked_by_hand() -> None:
    """Two of ten pairs are swapped: ρ = 1 − 6·4/(5·24) = 0.8 and τ = (8 − 2)/10 = 0.6."""
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    rho, tau = spearman(first, second), kendall(first, second)
    assert rho is not None and tau is not None
    # atanh 0.8 = ln 9 / 2 = 1.0986, error sqrt(1.32 / 2) = 0.8124; atanh 0.6 = ln 4 / 2, sqrt(0.437) = 0.6611
    assert (rho.value, rho.low, rho.high) == pytest.approx((0.8, -0.4571, 0.9908), abs=1e-4)
    assert (tau.value, tau.low, tau.high) == pytest.approx((0.6, -0.5388, 0.9633), abs=1e-4)


def test_position_alone_correlates_with_the_published_values() -> None:
    values = dict(enumerate(PUBLISHED))
    depth, middle = depth_correlation(values), middle_correlation(values, 28)
    assert depth is not None and middle is not None
    assert depth.value == pytest.approx(0.63, abs=0.005)
    assert (depth.low, depth.high) == pytest.approx((0.30, 0.82), abs=0.01)
    assert middle.value == pytest.approx(0.49, abs=0.005)


def test_position_is_that_of_the_blocks_which_were_ranked() -> None:
    # Of five blocks 0, 1 and 4: at distances 2, 1 and 2 from the middle.
    found = middle_correlation({0: 1.0, 1: 3.0, 4: 2.0}, 5)
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef([1, 3, 2], [1.5, 3, 1.5])[0, 1])
    depth = depth_correlation({0: 1.0, 1: 3.0, 4: 2.0})
    assert depth is not None and depth.value == pytest.approx(-0.5)


def test_the_same_order_and_the_reverse_have_no_interval() -> None:
    for measure in (spearman, kendall):
        assert measure(PUBLISHED, PUBLISHED) == Correlation(1.0, None, None)
        assert measure(PUBLISHED, BACKWARDS) == Correlation(-1.0, None, None)


@pytest.mark.parametrize("measure", [spearman, kendall])
def test_too_little_to_say(measure: object) -> None:
    assert callable(measure)
    assert measure([1.0, 2.0], [1.0, 2.0]) is None
    assert measure([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    few = measure([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0])
    assert (few.low, few.high) == (None, None)
    assert 0 < few.value < 1


def test_intervals_hold_what_they_should() -> None:
    """28 normal pairs with correlation 0.5: ρ = 6/π · asin 0.25 and τ = 2/π · asin 0.5 in the long run."""
    generator = np.random.default_rng(0)
    truths = {spearman: 6 / math.pi * math.asin(0.25), kendall: 2 / math.pi * math.asin(0.5)}
    held = dict.fromkeys(truths, 0)
    rounds = 400
    for _ in range(rounds):
        first, noise = generator.standard_normal((2, 28))
        second = 0.5 * first + math.sqrt(0.75) * noise
        for measure, truth in truths.items():
            found = measure(first.tolist(), second.tolist())
            assert found is not None and found.low is not None and found.high is not None
            held[measure] += found.low <= truth <= found.high
    for count in held.values():
        assert 0.92 <= count / rounds <= 0.98


def test_the_best_of_both() -> None:
    values = [float(k) for k in range(10)]
    other = [0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0]
    one = top_overlap(values, other, 2)
    # Of the 45 pairs of ten blocks, 28 have neither of two given ones.
    assert one == {"overlap": 1, "expected": 0.4, "p": pytest.approx(17 / 45)}
    both = top_overlap(values, values, 2)
    assert (both["overlap"], both["p"]) == (2, pytest.approx(1 / 45))
    # Of the blocks that share a value the deepest counts.
    assert top_overlap([1.0, 1.0, 1.0], [0.0, 0.0, 1.0], 1)["overlap"] == 1


def test_the_published_best_five() -> None:
    same, none = top_overlap(PUBLISHED, PUBLISHED, 5), top_overlap(PUBLISHED, BACKWARDS, 5)
    assert (same["overlap"], same["p"]) == (5, pytest.approx(1 / math.comb(28, 5)))
    assert (none["overlap"], none["p"]) == (0, 1.0)
    assert same["expected"] == none["expected"] == pytest.approx(25 / 28)


def test_values_between_blocks() -> None:
    values = {0: 0.0, 1: 10.0, 2: 20.0, 3: 40.0}
    assert at_relative_depths(values, 4, 3) == {0: 0.0, 1: 15.0, 2: 40.0}
    assert at_relative_depths(values, 4, 4) == values
    assert at_relative_depths({k: float(k) for k in range(5)}, 5, 3) == {0: 0.0, 1: 2.0, 2: 4.0}
    del values[2]
    assert at_relative_depths(values, 4, 3) == {0: 0.0, 2: 40.0}
    assert at_relative_depths({0: 1.0, 1: 2.0}, 2, 1) == {0: 1.0}


def test_a_straight_line_stays_straight() -> None:
    found = at_relative_depths({k: k / 35 for k in range(36)}, 36, 28)
    assert found == pytest.approx({k: k / 27 for k in range(28)})
