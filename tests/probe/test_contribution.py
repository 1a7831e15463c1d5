"""Against the 28 values that arXiv 2607.01232 publishes for Qwen3-1.7B, by hand, and against known truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from midtune.probe.contribution import (
    Scores,
    contribution_interval,
    gain_interval,
    mean_variance,
    plateau,
    standings,
)
from tests.probe.curves import FLAT, PEAK, PLATEAU, PUBLISHED, Problems

CURVES = {"plateau": PLATEAU, "peak": PEAK, "flat": FLAT}


def test_the_published_curve_is_a_plateau_and_a_cliff() -> None:
    found = plateau(dict(enumerate(PUBLISHED)))
    assert (found["first"], found["last"]) == (0, 17)
    assert found["inside"] == pytest.approx(0.90, abs=0.005)
    assert found["outside"] == pytest.approx(0.42, abs=0.005)


def test_a_flat_curve_is_all_plateau() -> None:
    assert plateau({3: 0.5, 4: 0.5}) == {"first": 3, "last": 4, "inside": 0.5, "outside": None}


def test_one_seed_has_the_variance_of_its_problems() -> None:
    # Deviations -1, 0, 0, 1: a variance of 2/3 for one problem, a quarter of it for the mean of four.
    variance, freedom = mean_variance(np.array([[0.0, 1.0, 1.0, 2.0]]))
    assert (variance, freedom) == (pytest.approx(1 / 6), 3)


def test_seeds_that_differ_alike_on_every_problem_leave_their_own_variance() -> None:
    # Seed means 0, 1 and 2, whose variance is 1; problems differ in nothing but the least that is assumed.
    values = np.repeat([[0.0], [1.0], [2.0]], 100, axis=1)
    variance, freedom = mean_variance(values)
    assert variance == pytest.approx(1 / 3 + (0.5 / 100) ** 2)
    assert freedom == pytest.approx(2, abs=0.01)


def test_problems_and_seeds_add_up() -> None:
    # Additive: no cell noise to take away.
    values = np.array([[0.0], [2.0]]) + np.array([0.0, 1.0, 1.0, 2.0])
    variance, _ = mean_variance(values)
    assert variance == pytest.approx(2 / 2 + (2 / 3) / 4)


def test_a_gain_is_paired_by_problem() -> None:
    base = np.linspace(0, 1, 50)
    found = gain_interval(base + 0.1, base)
    assert found.value == pytest.approx(0.1)
    # Every problem gained the same: what remains is that one of 50 may have come out half otherwise.
    assert found.high - found.low == pytest.approx(2 * 2.01 * 0.01, rel=0.01)


def test_contribution_is_the_share_of_the_full_gain() -> None:
    base = np.zeros(100)
    for gain, share in ((0.6, 1.5), (0.0, 0.0), (-0.4, -1.0)):
        found = contribution_interval(base + gain, base, base + 0.4)
        assert found is not None and found.value == pytest.approx(share)


def test_the_ratio_of_a_gain_to_itself_is_one_and_sure() -> None:
    rng = np.random.default_rng(0)
    base, full = rng.random(200), rng.random(200) + 0.5
    found = contribution_interval(full, base, full)
    assert found is not None
    assert found.value == 1
    assert 0.98 < found.low < 1 < found.high < 1.02


def test_without_a_clear_gain_of_full_training_there_is_no_ratio() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(50)
    for full in (base - 0.2, base + rng.normal(0.02, 0.3, 50)):
        assert contribution_interval(base + 0.1, base, full) is None


def test_one_block_alone_is_the_best() -> None:
    found = standings({7: [0.0, 1.0]})
    assert found[7].best_probability == 1 and found[7].among_best


def test_a_block_that_is_better_on_every_problem_is_told_apart() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    found = standings({1: hard, 2: hard + 0.2 + 0.01 * rng.random(200), 3: hard + 0.01 * rng.random(200)})
    assert [found[block].among_best for block in (1, 2, 3)] == [False, True, False]
    assert found[2].best_probability == 1


@dataclass
class Coverage:
    """How often, over many probes, what was claimed was so."""

    covered: float
    best_kept: float
    all_kept: float


def simulated(curve: list[float], seeds: int, training_noise: float, probes: int = 200) -> Coverage:
    rng = np.random.default_rng(0)
    covered, best_kept, all_kept = [], [], []
    best = {block for block, value in enumerate(curve) if value == max(curve)}
    for _ in range(probes):
        problems = Problems(rng, training_noise=training_noise)
        base = problems.base()
        full: Scores = problems.runs(1.0, seeds)
        scores = {block: problems.runs(value, seeds) for block, value in enumerate(curve)}
        for block, value in enumerate(curve):
            found = contribution_interval(scores[block], base, full)
            assert found is not None
            covered.append(found.low <= value <= found.high)
        among = {block for block, standing in standings(scores).items() if standing.among_best}
        best_kept.append(best <= among if len(best) == 1 else bool(best & among))
        all_kept.append(len(among) == len(curve))
    return Coverage(*(float(np.mean(found)) for found in (covered, best_kept, all_kept)))


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(("seeds", "training_noise"), [(1, 0.0), (3, 0.03)])
def test_intervals_cover_the_truth(name: str, seeds: int, training_noise: float) -> None:
    # One seed speaks for its own weights only, so there its truth is without training noise.
    found = simulated(CURVES[name], seeds, training_noise)
    assert 0.93 <= found.covered <= 0.97
    assert found.best_kept >= 0.95
    if name == "flat":
        assert found.all_kept >= 0.9


def test_more_seeds_make_the_interval_narrower() -> None:
    rng = np.random.default_rng(1)
    widths: list[list[float]] = []
    for _ in range(20):
        problems = Problems(rng, training_noise=0.05)
        base, runs = problems.base(), problems.runs(0.8, 12)
        found = [gain_interval(runs[:n], base) for n in (2, 4, 12)]
        widths.append([gain.high - gain.low for gain in found])
    two, four, twelve = np.mean(widths, 0)
    assert two > 2 * four > 3 * twelve
