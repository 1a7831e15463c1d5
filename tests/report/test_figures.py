import re

import pytest

from midtune.report.figures import line_style, metric_curve, ranking_curves, reward_curves
from tests.report.toy_probe import toy_probe

METRICS = [{"step": step, "reward": step / 4} for step in (1, 2, 3)]


def test_a_figure_takes_its_colours_from_the_page() -> None:
    figure = metric_curve(METRICS, "reward")
    assert figure.startswith('<svg viewBox="0 0 ') and figure.endswith("</svg>")
    assert "var(--blue)" in figure and "font-family" not in figure
    assert not re.search(r"#[0-9a-f]{6}\b", figure)
    assert set(re.findall(r' id="(\w+)-', figure)) == {"reward"}
    assert figure == metric_curve(METRICS, "reward")


def test_lines_are_told_apart_by_colour_and_then_by_dashes() -> None:
    styles = [line_style(number) for number in range(18)]
    assert len(set(styles)) == 18
    assert (styles[0], styles[6], styles[12]) == (("blue", ""), ("blue", "4 2"), ("blue", "1 2"))
    figure = reward_curves([METRICS] * 7)
    assert all(f"var(--{colour})" in figure for colour, _ in styles[:6])
    assert figure.count("stroke-dasharray") == 1


@pytest.mark.parametrize(("method", "figures"), [("sweep", 2), ("gradient", 1)])
def test_gains_have_a_price_and_signals_have_none(method: str, figures: int) -> None:
    assert len(ranking_curves(toy_probe([0.1, 0.3, 0.2], method=method))) == figures
    assert ranking_curves(toy_probe([None, None], method=method)) == []
