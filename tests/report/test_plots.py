from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from midtune.report.plots import contribution_curve, learning_curve, rankings_curve, smoothed, smoothing_width
from tests.report.toy_probe import toy_probe
from tests.report.toy_run import toy_report


def drawn(probe: dict[str, Any], folder: Path) -> str:
    """The picture's source, in which matplotlib notes each text as a comment."""
    file = folder / "probe.svg"
    contribution_curve(probe, file)
    return file.read_text(encoding="utf-8")


def test_a_sweep_is_drawn_by_depth_and_by_price(tmp_path: Path) -> None:
    probe = toy_probe([0.1, 0.2, 0.3, 0.25], half_width=0.1, full=0.4, among_best=[1, 2, 3])
    text = drawn(probe, tmp_path)
    for words in (
        *("toy on sums, sweep", "C(k) and 95% interval", "block", "selected", "not told apart from the best"),
        *("full training", "middle", "seconds per training step", "gain", "most gain for the cost"),
    ):
        assert f"<!-- {words} -->" in text
    assert drawn(probe, tmp_path) == text


def test_signals_have_no_price(tmp_path: Path) -> None:
    text = drawn(toy_probe([0.1, 0.2, 0.3], half_width=0.1, method="gradient"), tmp_path)
    assert "<!-- signal and 95% interval -->" in text
    assert "seconds per training step" not in text and "full training" not in text


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_figures_are_left_out(tmp_path: Path, missing: float | None) -> None:
    probe = toy_probe([0.1, missing, 0.3, 0.3], half_width=0.1, full=missing, depth_baseline=None)
    probe["blocks"][0] |= {"low": missing, "high": missing, "step_cost": missing}
    # The bootstrap's interval of a skewed mean may lie beside it.
    probe["blocks"][2] |= {"low": 0.31, "high": 0.4}
    text = drawn(probe, tmp_path)
    assert "<!-- middle -->" not in text and "<!-- full training -->" not in text
    assert "nan" not in text.lower()


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>-->$x^$"
    report = toy_report(model=name, task=name)
    learning_curve([{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}], report, tmp_path / "curve.svg")
    contribution_curve(toy_probe([0.1, 0.2], model=name, task=name), tmp_path / "probe.svg")
    for file in tmp_path.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "<script" not in text and "$x^$" in text
        ElementTree.fromstring(text)


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        rankings_curve({"1: toy": toy_probe([0.1, 0.3, 0.2]), "2: flat": toy_probe([0.1, 0.1])}, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 1000


def test_a_tenth_of_the_steps_is_smoothed_over() -> None:
    assert [smoothing_width(steps) for steps in (0, 3, 20, 104)] == [1, 1, 2, 10]
    # Of 21 steps one has no reward, so each mean is of two.
    rewards = [0.0, None, *(float(step) for step in range(2, 21))]
    metrics = [{"step": step, "reward": reward} for step, reward in enumerate(rewards)]
    steps, values, means = smoothed(metrics, "reward")
    assert steps == values == [0, *range(2, 21)]
    assert means == [0.0, 1.0, *(step - 0.5 for step in range(3, 21))]
