"""Against the 28 values that arXiv 2607.01232 publishes for Qwen3-1.7B, C(0) to C(27)."""

import numpy as np
import pytest

from midtune.probe.contribution import contribution, depth_correlation, middle_correlation, rank_correlation

PUBLISHED = [
    *(0.89, 0.87, 1.03, 0.75, 0.77, 0.78, 0.87, 0.80, 0.72, 1.04, 1.14, 0.92, 1.12, 1.01),
    *(0.92, 0.95, 0.85, 0.83, 0.66, 0.52, 0.32, 0.40, 0.47, 0.32, 0.28, 0.35, 0.36, 0.54),
]  # fmt: skip


def test_contribution_is_the_share_of_the_full_gain() -> None:
    assert contribution(51.7, 44.1, 50.8) == pytest.approx(7.6 / 6.7)
    assert contribution(44.1, 44.1, 50.8) == 0
    assert contribution(40.0, 44.0, 48.0) == -1


@pytest.mark.parametrize(("full", "noise"), [(44.1, 0.0), (40.0, 0.0), (45.0, 1.0), (44.0, -1.0)])
def test_contribution_is_undefined_where_full_training_gained_nothing(full: float, noise: float) -> None:
    assert contribution(50.0, 44.1, full, noise=noise) is None


def test_position_alone_correlates_with_the_published_values() -> None:
    assert depth_correlation(PUBLISHED) == pytest.approx(0.63, abs=0.005)
    assert middle_correlation(PUBLISHED) == pytest.approx(0.49, abs=0.005)


def test_the_published_curve_is_a_plateau_and_a_cliff() -> None:
    assert np.mean(PUBLISHED[:18]) == pytest.approx(0.90, abs=0.005)
    assert np.mean(PUBLISHED[18:]) == pytest.approx(0.42, abs=0.005)


def test_a_correlation_of_nothing_is_none() -> None:
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert rank_correlation([1.0, 5.0, 9.0], [2.0, 3.0, 8.0]) == pytest.approx(1)
