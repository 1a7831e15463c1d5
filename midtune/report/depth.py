"""A ranking by depth: its figures, the blocks that pay best for their price, and a text drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from midtune.report.formats import finite

ROWS, COLUMNS = 12, 80
# Values per row, times a power of ten.
STEPS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0)
# What `score` is, by the method of a probe.
SCORES = {"gradient": "signal", "race": "gain", "sweep": "gain", "trial": "gain"}
TITLES = {
    "C(k)": "C(k), the share of full training's gain, by depth",
    "gain": "gain over the untrained model, by depth",
    "signal": "reward-gradient signal by depth",
}


@dataclass(frozen=True)
class Point:
    """A block's value and its 95% interval; bounds are None if not measured."""

    block: int
    value: float
    low: float | None
    high: float | None


def unit_of(largest: float) -> float:
    """The power of ten to divide by so that values up to `largest` are readable with three decimals."""
    return 1.0 if largest == 0 or 0.1 <= largest < 100 else 10.0 ** math.floor(math.log10(largest))


def score_name(probe: Mapping[str, Any]) -> str:
    """What a probe.json's scores are: `gain` or `signal`."""
    return SCORES.get(probe["method"], "score")


def value_name(probe: Mapping[str, Any]) -> str:
    """What `points` hold: `C(k)` if full training was measured, else the score's name."""
    return "C(k)" if _has_contributions(probe) else score_name(probe)


def points(probe: Mapping[str, Any]) -> list[Point]:
    """The blocks of a probe.json by depth, with C(k) if known, else the score; blocks with neither are left out."""
    value, low, high = "score", "low", "high"
    if _has_contributions(probe):
        value, low, high = "contribution", "contribution_low", "contribution_high"
    rows = sorted(probe["blocks"], key=lambda row: row["block"])
    return [
        Point(row["block"], found, finite(row.get(low)), finite(row.get(high)))
        for row in rows
        if (found := finite(row.get(value))) is not None
    ]


def full_training(probe: Mapping[str, Any]) -> tuple[float, float | None, float | None] | None:
    """What training every block reached, on the scale of `points`, and its 95% interval; None if not measured."""
    if _has_contributions(probe):
        return 1.0, None, None
    full = probe.get("full") or {}
    value = finite(full.get("score"))
    return None if value is None else (value, finite(full.get("low")), finite(full.get("high")))


def plateau_of(probe: Mapping[str, Any]) -> range:
    """The blocks at or above half of the curve's height; empty unless a sweep measured them."""
    found = probe.get("plateau")
    return range(found["first"], found["last"] + 1) if found else range(0)


def depth_of(probe: Mapping[str, Any]) -> int:
    """The number of blocks; if the file does not say, up to the deepest one listed."""
    count: int | None = probe.get("num_blocks")
    return count or 1 + max(row["block"] for row in probe["blocks"])


def priced(probe: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Block → its gain and the seconds of its step, if both are known; signals have no price."""
    return {
        row["block"]: (gain, cost)
        for row in (probe["blocks"] if score_name(probe) == "gain" else ())
        if (gain := finite(row.get("score"))) is not None
        and (cost := finite(row.get("step_cost"))) is not None
    }


def frontier(probe: Mapping[str, Any]) -> set[int]:
    """Blocks whose gain no other block reaches at a lower price, nor exceeds at the same."""
    found = priced(probe)

    def beaten(gain: float, cost: float) -> bool:
        others = (other for other in found.values() if other != (gain, cost))
        return any(other >= gain and price <= cost for other, price in others)

    return {block for block, (gain, cost) in found.items() if not beaten(gain, cost)}


# The parts of a drawing, and a mark for each.
PARTS = ("block", "selected", "interval", "zero", "full", "axis", "tick", "corner", "floor", "plateau")
MARKS, ASCII_MARKS = "●◆│·╌│┤└─━", "o*|.-|++-="


@dataclass(frozen=True)
class DepthCurve:
    """Each block's value by depth with its 95% interval, zero, full training, the middle and the plateau.

    At most 80 columns wide. With more blocks, a column stands for several and shows the selected or else the best
    one. The probe.json needs at least one finite value.
    """

    probe: Mapping[str, Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(min(options.max_width, COLUMNS), ascii_only=options.ascii_only)

    def lines(self, width: int, *, ascii_only: bool) -> list[Text]:
        """The drawing line by line; selected blocks are bold."""
        marks = dict(zip(PARTS, ASCII_MARKS if ascii_only else MARKS, strict=True))
        selected, num_blocks = set(self.probe.get("selected") or []), depth_of(self.probe)
        middle = (self.probe.get("depth_baseline") or {}).get("block")
        stretch, full = plateau_of(self.probe), full_training(self.probe)
        # If blocks share a column, the last in this order is shown.
        shown = sorted(points(self.probe), key=lambda point: (point.block in selected, point.value))
        known = [0.0] if full is None else [0.0, full[0]]
        known += [end for point in shown for end in (point.low, point.value, point.high) if end is not None]
        step = _step(min(known), max(known))
        bottom, top = round(min(known) / step), round(max(known) / step)
        unit = unit_of(max(map(abs, known)))
        labels = {level: f"{level * step / unit:.4g}" for level in range(bottom, top + 1) if level % 2 == 0}
        margin = max(map(len, labels.values()))
        # The number of the last block may reach beyond its column.
        room = max(1, width - margin - 2 - len(str(num_blocks - 1)))
        per_column = math.ceil(num_blocks / room)
        spacing = 2 if 2 * num_blocks <= room else 1
        columns = math.ceil(num_blocks / per_column) * spacing

        def row_of(value: float) -> int:
            return top - round(value / step)

        def column_of(block: int) -> int:
            return block // per_column * spacing

        in_columns = {column_of(point.block): point for point in shown}
        cells = [[(" ", "")] * columns for _ in range(bottom, top + 1)]
        cells[row_of(0)] = [(marks["zero"], "")] * columns
        if full is not None:
            cells[row_of(full[0])] = [(marks["full"], "")] * columns
        for column, point in in_columns.items():
            kind, style = ("selected", "bold") if point.block in selected else ("block", "")
            if point.low is not None and point.high is not None:
                for row in range(row_of(point.high), row_of(point.low) + 1):
                    cells[row][column] = marks["interval"], style
            cells[row_of(point.value)][column] = marks[kind], style

        title = TITLES.get(value_name(self.probe), "score by depth")
        title += "" if unit == 1 else f", in units of {unit:.0e}"
        drawn = [Text(title + (f"; the best of every {per_column} blocks" if per_column > 1 else ""))]
        for row, line in enumerate(cells):
            label = labels.get(top - row)
            axis = f"{label or '':>{margin}} {marks['axis' if label is None else 'tick']} "
            drawn.append(Text.assemble(axis, *line))
            drawn[-1].rstrip()
        floor = [marks["floor"]] * (columns + 1)
        if stretch:
            first, last = 1 + column_of(stretch[0]), 1 + column_of(stretch[-1])
            floor[first : last + 1] = [marks["plateau"]] * (last + 1 - first)
        if middle is not None:
            floor[1 + column_of(middle)] = "m"
        drawn.append(Text(" " * (margin + 1) + marks["corner"] + "".join(floor)))
        drawn.append(Text(" " * (margin + 3) + _numbers(num_blocks, spacing, per_column)))
        chosen = [point.block in selected for point in in_columns.values()]
        names = {
            f"{marks['block']} block": not all(chosen),
            f"{marks['selected']} selected": any(chosen),
            f"{marks['interval']} 95% interval": any(point.low is not None for point in in_columns.values()),
            f"{marks['full']} full training": full is not None,
            "m middle": middle is not None,
            f"{marks['plateau']} above half": bool(stretch),
        }
        drawn.append(Text("  ".join(name for name, there in names.items() if there)))
        return drawn


def _has_contributions(probe: Mapping[str, Any]) -> bool:
    return any(finite(row.get("contribution")) is not None for row in probe["blocks"])


def _step(least: float, greatest: float) -> float:
    """The smallest round number per row with which the values fit into the rows."""
    if least == greatest:
        return 1.0
    power = 10.0 ** math.floor(math.log10((greatest - least) / ROWS))
    steps = (factor * power for factor in STEPS)
    return next(step for step in steps if round(greatest / step) - round(least / step) <= ROWS)


def _numbers(num_blocks: int, spacing: int, per_column: int) -> str:
    """Block numbers under their columns, spaced apart."""
    room = (len(str(num_blocks - 1)) + 1) * per_column
    every = next(step for step in (1, 5, 10, 20, 50, 100, 200, 500, num_blocks) if step * spacing >= room)
    line = ""
    for block in range(0, num_blocks, every):
        line = line.ljust(block // per_column * spacing) + str(block)
    return line
