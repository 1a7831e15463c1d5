from typing import Any

import pytest
from rich.console import Console

from midtune.report.depth import DepthCurve, Point, frontier, full_training, points, unit_of, value_name
from tests.report.printed import rendered
from tests.report.toy_probe import toy_probe

SIX = [0.1, 0.2, 0.3, 0.5, 0.2, -0.1]


def test_contributions_with_intervals() -> None:
    probe = toy_probe(SIX, half_width=0.1, full=0.4)
    assert rendered(DepthCurve(probe)) == [
        "C(k), the share of full training's gain, by depth",
        "     │       │",
        " 1.2 ┤       ◆",
        "     │ ╌╌╌╌│╌│╌╌╌╌╌",
        " 0.8 ┤   │ ●   │",
        "     │   │ │   │",
        " 0.4 ┤ │ ● │   ●",
        "     │ ● │     │",
        "   0 ┤ │·········│·",
        "     │           ●",
        "-0.4 ┤           │",
        "     └─────m───────",
        "       0 1 2 3 4 5",
        "● block  ◆ selected  │ 95% interval  ╌ full training  m middle",
    ]


def test_scores_in_ascii() -> None:
    probe = toy_probe(SIX, half_width=0.1, method="gradient")
    assert rendered(DepthCurve(probe), encoding="ascii") == [
        "reward-gradient signal by depth",
        "  0.6 +       |",
        "      |       *",
        " 0.45 +       |",
        "      |     | |",
        "  0.3 +   | o   |",
        "      | | o |   o",
        " 0.15 + | |     |",
        "      | o |     |",
        "    0 + |.........|.",
        "      |           o",
        "-0.15 +           |",
        "      |           |",
        "      +-----m-------",
        "        0 1 2 3 4 5",
        "o block  * selected  | 95% interval  m middle",
    ]


def test_the_plateau_is_marked_on_the_axis() -> None:
    probe = toy_probe(SIX, half_width=0.1, full=0.4, plateau={"first": 2, "last": 4})
    lines = rendered(DepthCurve(probe))
    assert lines[-3] == "     └─────m━━━━───"
    assert lines[-1].endswith("m middle  ━ above half")
    assert max(map(len, lines)) <= 80


def test_selected_blocks_are_bold() -> None:
    lines = DepthCurve(toy_probe(SIX, half_width=0.1, selected=[3, 4])).lines(80, ascii_only=False)
    bold = [line.plain[span.start : span.end] for line in lines for span in line.spans]
    assert set(bold) == {"◆", "│"}
    assert bold.count("◆") == 2
    file = Console(record=True, width=80, force_terminal=True, color_system=None)
    with file.capture() as captured:
        file.print(DepthCurve(toy_probe(SIX)))
    assert "◆" in captured.get()


def test_equal_values_without_intervals() -> None:
    lines = rendered(DepthCurve(toy_probe([0.6] * 4, selected=[])))
    assert lines[1] == "0.6 ┤ ● ● ● ●"
    assert lines[-4] == "  0 ┤ ········"
    assert lines[-1] == "● block  m middle"
    assert rendered(DepthCurve(toy_probe([0.0] * 4, selected=[])))[1:3] == [
        "0 ┤ ●·●·●·●·",
        "  └───m─────",
    ]


def test_missing_values_are_gaps() -> None:
    probe = toy_probe([None, float("nan"), 0.3, None, 0.2, None], selected=[2], depth_baseline=None)
    lines = rendered(DepthCurve(probe))
    assert lines[1] == " 0.3 ┤     ◆"
    assert sum(line.count("●") for line in lines[:-1]) == 1
    assert "m" not in lines[-3] and "middle" not in lines[-1]
    assert lines[-2] == "       0 1 2 3 4 5"


def test_many_blocks_share_columns() -> None:
    """Of 96 blocks two share a column: the best of both, or the selected one."""
    scores = [0.1 + 0.004 * block if block < 50 else 0.1 for block in range(96)]
    lines = rendered(DepthCurve(toy_probe(scores, half_width=0.01, selected=[40])))
    assert lines[0] == "gain over the untrained model, by depth; the best of every 2 blocks"
    assert len(lines) <= 17
    assert sum(line.count("●") for line in lines[:-1]) == 47
    assert lines[-2] == "       0    10   20   30   40   50   60   70   80   90"
    (column,) = {line.index("◆") for line in lines[:-1] if "◆" in line}
    assert column == lines[-2].index("40")
    assert lines[-3].index("m") == 7 + 47 // 2


@pytest.mark.parametrize("count", [1, 2, 3, 28, 36, 48, 62, 96, 126, 300])
@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_every_model_fits(count: int, width: int) -> None:
    probe = toy_probe([1e-5 * block for block in range(count)], half_width=3e-5)
    for line in DepthCurve(probe).lines(min(width, 80), ascii_only=False)[1:-1]:
        assert len(line.plain) <= min(width, 80)
    assert len(rendered(DepthCurve(probe))) <= 18


def test_a_part_of_the_blocks_keeps_its_depth() -> None:
    probe = toy_probe([0.1] * 20, method="gradient", selected=[5])
    probe["blocks"] = probe["blocks"][5:15]
    lines = rendered(DepthCurve(probe))
    assert lines[1].index("◆") == lines[-2].index("5")
    assert lines[-2].endswith("15")
    del probe["num_blocks"]
    assert rendered(DepthCurve(probe))[-2].endswith("10")


def test_small_values_have_a_unit() -> None:
    lines = rendered(DepthCurve(toy_probe([1e-5, 5e-5, 2e-5], method="gradient")))
    assert lines[0] == "reward-gradient signal by depth, in units of 1e-05"
    assert lines[1].startswith("5 ┤")


def test_points_are_contributions_where_there_are_any() -> None:
    probe = toy_probe([0.1, 0.2], half_width=0.1, full=0.2)
    probe["blocks"][0]["contribution"] = None
    assert points(probe) == [Point(1, 1.0, pytest.approx(0.5), pytest.approx(1.5))]
    assert (value_name(probe), full_training(probe)) == ("C(k)", (1.0, None, None))
    probe["blocks"][1]["contribution"] = float("nan")
    assert [point.value for point in points(probe)] == [0.1, 0.2]
    assert (value_name(probe), full_training(probe)) == ("gain", (0.2, 0.2, 0.2))
    old = toy_probe([0.1], method="gradient")
    del old["full"], old["blocks"][0]["contribution_low"]
    assert (value_name(old), full_training(old)) == ("signal", None)


@pytest.mark.parametrize(
    ("priced", "best"),
    [
        ([], set()),
        ([(0.1, 2.0)], {0}),
        # Block 1 gains more at a lower price than block 0.
        ([(0.1, 2.0), (0.2, 1.0)], {1}),
        ([(0.2, 2.0), (0.1, 1.0)], {0, 1}),
        # Of an equal gain the cheaper counts, of an equal price the greater gain, of equals both.
        ([(0.2, 2.0), (0.2, 1.0)], {1}),
        ([(0.2, 1.0), (0.1, 1.0)], {0}),
        ([(0.2, 1.0), (0.2, 1.0)], {0, 1}),
        ([(0.9, None), (None, 0.1), (0.1, 1.0), (float("nan"), 1.0)], {2}),
    ],
)
def test_frontier(priced: list[tuple[Any, Any]], best: set[int]) -> None:
    rows = [{"block": block, "score": score, "step_cost": cost} for block, (score, cost) in enumerate(priced)]
    assert frontier({"method": "sweep", "blocks": rows}) == best
    assert frontier({"method": "gradient", "blocks": rows}) == set()


def test_units() -> None:
    assert [unit_of(value) for value in (0, 0.1, 99.0)] == [1.0, 1.0, 1.0]
    assert [unit_of(value) for value in (0.02, 4e-5, 123.0)] == pytest.approx([1e-2, 1e-5, 100.0])
