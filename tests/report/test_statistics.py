import math

import numpy as np
import pytest

from midtune.report.statistics import Estimate, jaccard, paired_gain, pass_at_k, score_interval


def test_wilson_for_solved_or_not() -> None:
    # 4 of 10, z = 1.95996: centre (0.4 + z²/20) / (1 + z²/10) = 0.42775,
    # margin z / (1 + z²/10) sqrt(0.4·0.6/10 + z²/400) = 0.25943.
    found = score_interval([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert (found.score, found.n) == (0.4, 10)
    assert (found.low, found.high) == pytest.approx((0.16818, 0.68733), abs=1e-5)


def test_none_solved_still_has_width() -> None:
    # Wilson for 0 of 20: high = z² / (20 + z²) = 3.8415 / 23.8415.
    found = score_interval([False] * 20)
    assert (found.score, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.16113, abs=1e-5)
    assert score_interval([True] * 20).low == pytest.approx(1 - 0.16113, abs=1e-5)


def test_equal_fractions_are_not_certain() -> None:
    # 0.025^(1/20) = 0.83157: up to 16.84% of problems may differ, down to 0 or up to 1.
    found = score_interval([0.25] * 20)
    assert (found.low, found.high) == pytest.approx((0.25 - 0.16843 * 0.25, 0.25 + 0.16843 * 0.75), abs=1e-5)
    assert (score_interval([0.5]).low, score_interval([0.5]).high) == pytest.approx((0.0125, 0.9875))


def test_equal_unbounded_scores_say_nothing() -> None:
    found = score_interval([3.0, 3.0])
    assert found.score == 3.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_few_problems_use_student_t() -> None:
    # Mean 2.5, standard deviation 1.29099, t(3) = 3.18245: margin 3.18245 · 1.29099 / 2.
    found = score_interval([1, 2, 3, 4])
    assert (found.low, found.high) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-5)
    clipped = score_interval([0.1, 0.2, 0.9])
    assert (clipped.low, clipped.high) == (0.0, 1.0)


def test_gain_is_paired() -> None:
    generator = np.random.default_rng(1)
    before = generator.random(50)
    after = before + 0.1 * generator.random(50)
    found = paired_gain(before, after)
    assert 0.03 < found.low < found.value < found.high < 0.07
    assert found == paired_gain(before, after)


def test_few_pairs_use_student_t() -> None:
    # Differences 1, 0, 1, 0: mean 0.5, standard deviation 0.57735, margin 3.18245 · 0.57735 / 2 = 0.91869.
    found = paired_gain([0, 1, 0, 0], [1, 1, 1, 0])
    assert (found.value, found.low) == (0.5, pytest.approx(0.5 - 0.91869, abs=1e-5))
    assert found.high == 1.0


def test_no_change_at_all_is_bounded_by_what_was_not_seen() -> None:
    found = paired_gain([0, 1] * 150, [0, 1] * 150)
    # 1 - 0.025^(1/300) = 0.01222.
    assert found == Estimate(0.0, pytest.approx(-0.01222, abs=1e-5), pytest.approx(0.01222, abs=1e-5))


def test_bad_scores() -> None:
    for scores in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="one per problem"):
            score_interval(scores)
    with pytest.raises(ValueError, match="2 scores before and 3 after"):
        paired_gain([0, 1], [0, 1, 1])


@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_cover_the_truth(samples: int) -> None:
    """40 problems of uniform difficulty: 95% of intervals hold the true mean and the true gain."""
    generator = np.random.default_rng(0)
    covered, repetitions = np.zeros(2), 150
    for _ in range(repetitions):
        difficulty = 0.9 * generator.random(40)
        before = generator.binomial(samples, difficulty) / samples
        after = generator.binomial(samples, difficulty + 0.1) / samples
        score, gain = score_interval(before), paired_gain(before, after)
        covered += [score.low <= 0.45 <= score.high, gain.low <= 0.1 <= gain.high]
    assert (covered >= 0.9 * repetitions).all()
    assert (covered <= 0.99 * repetitions).all()


def test_jaccard_counts_what_both_solve_among_what_either_does() -> None:
    # Both solve the first, one more is solved by each alone, nobody solves the last.
    assert jaccard([1, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx(1 / 3)
    assert jaccard([True, False], [True, False]) == 1.0
    assert jaccard([True, False], [False, True]) == 0.0
    assert jaccard([False, False], [False, False]) is None


def test_pass_at_k_by_hand() -> None:
    # Of 4 samples 0, 1, 2 and 4 are correct: C(4, 2) = 6 pairs, of which 6, 3, 1 and 0 are all wrong.
    assert pass_at_k(4, [0, 1, 2, 4], 2).tolist() == pytest.approx([0, 1 / 2, 5 / 6, 1])
    assert pass_at_k(4, [0, 1, 2, 4], 1).tolist() == pytest.approx([0, 1 / 4, 2 / 4, 1])
    assert pass_at_k(4, [0, 1], 4).tolist() == [0, 1]


def test_pass_at_k_does_not_overflow() -> None:
    exact = 1 - math.comb(9990, 5000) / math.comb(10000, 5000)
    assert pass_at_k(10000, [10], 5000)[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_more_than_was_drawn_is_no_estimate(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from 4 samples"):
        pass_at_k(4, [1], k)
