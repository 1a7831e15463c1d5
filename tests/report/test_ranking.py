from typing import Any

import pytest

from midtune.report.ranking import IntervalBar, probe_table
from tests.report.printed import rendered
from tests.report.toy_probe import toy_probe

PROBE: dict[str, Any] = {
    "schema": 1,
    "model": "tiny",
    "task": "reasoning-gym:chain_sum",
    "method": "gradient",
    "cost_seconds": 83.2,
    "blocks": [
        {"block": block, "score": score, "low": low, "high": high, "step_cost": cost, "rank": rank}
        for block, score, low, high, cost, rank in (
            (0, 0.1, 0.0, 0.2, 2.0, 3),
            (1, 0.5, 0.3, 1.0, 1.5, 1),
            (2, 0.2, 0.1, 0.4, 1.0, 2),
        )
    ],
    "selected": [1],
    "depth_baseline": {"block": 2, "score": 0.2},
}


def test_probe_on_80_columns() -> None:
    assert rendered(probe_table(PROBE)) == [
        "tiny on reasoning-gym:chain_sum",
        "",
        "reward-gradient signal by depth",
        "  1 ┤   │",
        "    │   │",
        "0.8 ┤   │",
        "    │   │",
        "0.6 ┤   │",
        "    │   ◆",
        "0.4 ┤   │ │",
        "    │   │ │",
        "0.2 ┤ │   ●",
        "    │ ●   │",
        "  0 ┤ │·····",
        "    └─────m─",
        "      0 1 2",
        "● block  ◆ selected  │ 95% interval  m middle",
        "",
        "   rank  block  signal    95% interval                          cost",
        "────────────────────────────────────────────────────────────────────",
        "*     1      1   0.500  0.300 to 1.000        ────●───────────   75%",
        "      2      2   0.200  0.100 to 0.400    ──●────                50%",
        "      3      0   0.100  0.000 to 0.200  ──●──                   100%",
        "",
        "* selected. 3 blocks ranked by the gradient method in 83.2 s.",
        "Position alone would take block 2 (signal 0.2).",
        "Cost: time of a training step, relative to the dearest block here.",
    ]


def test_probe_with_contributions_and_negative_scores_fits() -> None:
    rows = [{**row, "score": -row["score"], "low": -1.0, "contribution": -0.51} for row in PROBE["blocks"]]
    lines = rendered(probe_table({**PROBE, "blocks": rows}), encoding="ascii")
    assert any("C(k)" in line for line in lines)
    assert sum("-0.510" in line for line in lines) == 3


def test_tiny_scores_are_shown_in_a_power_of_ten() -> None:
    rows = [{**row, **{key: row[key] * 1e-5 for key in ("score", "low", "high")}} for row in PROBE["blocks"]]
    lines = rendered(probe_table({**PROBE, "blocks": rows}))
    (heading,) = [line for line in lines if "rank  block" in line]
    assert "signal, 1e-05" in heading
    assert any("0.500  0.300 to 1.000" in line for line in lines)


def test_interval_bar() -> None:
    assert IntervalBar(0.5, 0.0, 1.0, 0.0, 1.0).text(ascii_only=True) == "----------o-----------"
    assert IntervalBar(0.5, 0.0, 1.0, 0.0, 1.0).text(5, ascii_only=True) == "--o--"
    assert IntervalBar(1.0, None, None, 0.0, 1.0).text(ascii_only=True) == " " * 21 + "o"
    assert IntervalBar(1.0, 1.0, 1.0, 1.0, 1.0).text(ascii_only=False).strip() == "●"


def test_a_sweep_with_all_that_can_be_known_fits() -> None:
    probe = toy_probe([0.01, 0.02, -0.03, 0.015], half_width=0.04, full=0.02, selected=[1])
    for row, chance in zip(probe["blocks"], (0.1, 0.62, 0.0, 0.28), strict=True):
        row.update(best_probability=chance, steps=60 - row["block"])
    probe |= {"among_best": [0, 1, 3], "position": {"depth": 0.2, "middle": -0.4}, "note": "A note."}
    probe["plateau"] = {"first": 0, "last": 1, "inside": 0.75, "outside": -0.375}
    lines = rendered(probe_table(probe))
    table = lines.index("") + 1
    table += lines[table:].index("") + 1
    assert lines[table].split() == [
        *("rank", "block", "gain,", "1e-02", "95%", "interval", "C(k)", "best", "steps", "cost"),
    ]
    assert lines[table + 2].split()[-5:] == ["1.000", "62%", "59", "88%", "+"]
    assert lines[table + 5].split()[-4:] == ["-1.500", "0%", "58", "75%"]
    assert lines[table + 7 :] == [
        "* selected. 4 blocks ranked by the sweep method in 60.0 s.",
        "Not told apart from block 1, the best: blocks 0, 3.",
        "Best: the probability that no other block is better.",
        "A note.",
        "Full training: gain 0.020 (0.020 to 0.020).",
        "Position alone would take block 1 (gain 0.02).",
        "Above half of the curve's height: blocks 0-1, mean C(k) 0.75, the others -0.38.",
        "Spearman correlation with minus depth 0.20, with closeness to the middle -0.40.",
        "Cost: time of a training step, relative to the dearest block here.",
        "+ no other block gains as much at a lower cost.",
    ]


@pytest.mark.parametrize(
    ("among", "words"),
    [
        ([2], "Not told apart from block 2, the best: no other block."),
        ([2, 3], "Not told apart from block 2, the best: block 3."),
        ([0, 1, 2, 4], "Not told apart from block 2, the best: blocks 0-1, 4."),
    ],
)
def test_blocks_that_are_not_told_apart(among: list[int], words: str) -> None:
    probe = toy_probe([0.1, 0.2, 0.3, 0.15, 0.1], half_width=0.1, among_best=among)
    lines = rendered(probe_table(probe))
    assert words in lines
    assert not any("reaches" in line for line in lines)


def test_of_many_blocks_the_best_are_listed() -> None:
    probe = toy_probe([0.001 * block for block in range(96)], half_width=0.01, selected=[10, 95])
    lines = rendered(probe_table(probe))
    head = next(place for place, line in enumerate(lines) if "rank  block" in line)
    listed = [line.removeprefix("*").split()[:2] for line in lines[head + 2 : head + 18]]
    assert listed == [[str(rank), str(96 - rank)] for rank in (*range(1, 16), 86)]
    assert "80 more blocks are in probe.json." in lines


def test_what_nobody_measured_is_a_dash() -> None:
    probe = toy_probe([None, None, None], selected=[], depth_baseline=None)
    for row in probe["blocks"]:
        del row["contribution"], row["step_cost"]
    lines = rendered(probe_table(probe))
    assert lines[2].split() == ["rank", "block", "gain", "95%", "interval", "cost"]
    assert lines[4].split() == ["1", "0", "-", "-", "-"]


def test_signals_have_no_frontier() -> None:
    def marked(method: str) -> bool:
        probe = toy_probe([0.1, 0.3, 0.2], half_width=0.1, method=method)
        return any(line.startswith("+") for line in rendered(probe_table(probe)))

    assert [marked(method) for method in ("gradient", "race", "sweep")] == [False, True, True]
