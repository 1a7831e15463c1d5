"""The ranking of blocks for a terminal of 80 columns, a pipe or a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from midtune.report.depth import DepthCurve, frontier, plateau_of, points, score_name, unit_of, value_name
from midtune.report.formats import finite, interval_text, known, seconds_text, share_text, with_interval
from midtune.report.tables import plain_table, titled

BAR_WIDTH = 22
# A longer ranking lists only the best.
MOST_ROWS, BEST_ROWS = 40, 15


def probe_table(probe: Mapping[str, Any]) -> RenderableType:
    """Show the ranking: drawn by depth, then best first with intervals on a common scale."""
    rows = sorted(probe["blocks"], key=lambda row: row["rank"])
    selected = set(probe.get("selected") or [])
    shown = rows
    if len(rows) > MOST_ROWS:
        shown = [row for row in rows if row["rank"] <= BEST_ROWS or row["block"] in selected]
    bounds = known(rows, "low") + known(rows, "score") + known(rows, "high")
    dearest = max(known(rows, "step_cost"), default=1.0)
    gainful = frontier(probe)
    unit = unit_of(max(map(abs, bounds), default=1.0))
    columns: dict[str, Callable[[Mapping[str, Any]], RenderableType]] = {
        "mark": lambda row: "*" if row["block"] in selected else "",
        "rank": lambda row: str(row["rank"]),
        "block": lambda row: str(row["block"]),
        score_name(probe) + ("" if unit == 1 else f", {unit:.0e}"): lambda row: _number(row["score"], unit),
        "95% interval": lambda row: interval_text(row, unit=unit) or "-",
    }
    if bounds:
        ends = min(bounds), max(bounds)
        columns["bar"] = lambda row: IntervalBar(row["score"], row.get("low"), row.get("high"), *ends)
    if known(rows, "contribution"):
        columns["C(k)"] = lambda row: _number(row.get("contribution"))
    if known(rows, "best_probability"):
        columns["best"] = lambda row: share_text(row.get("best_probability"))
    if len({row.get("steps") for row in rows}) > 1:
        # In a race, blocks that fall behind stop early.
        columns["steps"] = lambda row: str(row.get("steps") or "-")
    columns["cost"] = lambda row: share_text(row.get("step_cost"), dearest)
    if gainful:
        columns["frontier"] = lambda row: "+" if row["block"] in gainful else ""
    table = plain_table()
    for name in columns:
        heading = "" if name in ("mark", "bar", "frontier") else name
        # Only the bar may shrink.
        table.add_column(heading, justify="right", no_wrap=name != "bar")
    for row in shown:
        cells = [cell(row) for cell in columns.values()]
        table.add_row(*cells, style="bold" if row["block"] in selected else None)
    curve: list[RenderableType] = [DepthCurve(probe), ""] if points(probe) else []
    notes = _notes(probe, rows, left_out=len(rows) - len(shown))
    return titled(f"{probe['model']} on {probe['task']}", "", *curve, table, "", *notes)


@dataclass(frozen=True)
class IntervalBar:
    """A value and its interval (if its bounds are finite) on a common scale, up to `BAR_WIDTH` characters wide."""

    value: float | None
    low: float | None
    high: float | None
    scale_low: float
    scale_high: float

    def text(self, width: int = BAR_WIDTH, *, ascii_only: bool) -> str:
        """The bar, `width` characters wide."""
        line, point = ("-", "o") if ascii_only else ("─", "●")
        span = self.scale_high - self.scale_low

        def place(value: float) -> int:
            share = (value - self.scale_low) / span if span > 0 else 0.5
            return min(width - 1, max(0, round(share * (width - 1))))

        cells = [" "] * width
        value, low, high = map(finite, (self.value, self.low, self.high))
        if low is not None and high is not None:
            for cell in range(place(low), place(high) + 1):
                cells[cell] = line
        if value is not None:
            cells[place(value)] = point
        return "".join(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(BAR_WIDTH, options.max_width)
        yield Segment(self.text(width, ascii_only=options.ascii_only))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, BAR_WIDTH)


def _notes(probe: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], left_out: int) -> Iterable[str]:
    name = score_name(probe)
    took = seconds_text(probe["cost_seconds"])
    yield f"* selected. {len(rows)} blocks ranked by the {probe['method']} method in {took}."
    if left_out:
        yield f"{left_out} more blocks are in probe.json."
    if (among := probe.get("among_best")) is not None:
        near = sorted(set(among) - {rows[0]["block"]})
        what = f"block{'s' * (len(near) > 1)} {_ranges(near)}" if near else "no other block"
        yield f"Not told apart from block {rows[0]['block']}, the best: {what}."
    if known(rows, "best_probability"):
        yield "Best: the probability that no other block is better."
    if probe.get("note"):
        yield probe["note"]
    full = probe.get("full") or {}
    if finite(full.get("score")) is not None:
        yield f"Full training: {name} {with_interval(_number(full['score']), interval_text(full))}."
    depth = probe.get("depth_baseline") or {}
    if finite(depth.get("score")) is not None:
        yield f"Position alone would take block {depth['block']} ({name} {depth['score']:.3g})."
    if stretch := plateau_of(probe):
        inside, outside = probe["plateau"]["inside"], probe["plateau"]["outside"]
        rest = "" if outside is None else f", the others {outside:.2f}"
        where = f"blocks {_ranges(stretch)}, mean {value_name(probe)} {inside:.2f}"
        yield f"Above half of the curve's height: {where}{rest}."
    position = probe.get("position") or {}
    ways = {"minus depth": position.get("depth"), "closeness to the middle": position.get("middle")}
    if found := [f"with {way} {rho:.2f}" for way, rho in ways.items() if finite(rho) is not None]:
        yield f"Spearman correlation {', '.join(found)}."
    yield "Cost: time of a training step, relative to the dearest block here."
    if frontier(probe):
        yield "+ no other block gains as much at a lower cost."


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted block numbers in the form of --layers: `3, 7-9`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _number(value: Any, unit: float = 1.0) -> str:
    figure = finite(value)
    return "-" if figure is None else f"{figure / unit:.3f}"
