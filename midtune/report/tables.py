"""The report and the ranking as tables for a terminal of 80 columns, a pipe or a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

MEMORY_SOURCES = {"cuda_allocated": "CUDA tensors", "resident": "process"}
BAR_WIDTH = 22


def bytes_text(count: float) -> str:
    """A number of bytes as a person reads it: `1.25 GiB`, `13.5 MiB`, `512 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """A duration as a person reads it: `12 ms`, `2.31 s`, `45.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 0.1:
        return f"{seconds * 1000:.{0 if seconds >= 0.001 or seconds == 0 else 2}f} ms"
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    return _minutes_text(seconds)


def whole_seconds_text(seconds: float) -> str:
    """A duration that is still running or guessed, without false precision: `8 s`, `1 min 20 s`."""
    return f"{math.ceil(seconds)} s" if math.ceil(seconds) < 60 else _minutes_text(seconds)


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """What a run gained and saved.

    Args:
        report: a report.json.
    """
    blocks = ", ".join(str(block) for block in report["blocks"])
    heading = (
        f"{report['model']} on {report['task']}: block{'s' * (len(report['blocks']) > 1)} {blocks} trained"
    )
    parts: list[RenderableType] = [Text(heading, style="bold"), "", _quality(report), _savings(report)]
    if _finite(report["time"].get("full_tokens")) and _finite(report["time"].get("compared_tokens")):
        here, there = (report["time"][key] for key in ("compared_tokens", "full_tokens"))
        parts.append(
            Text(f"First prompts: completions of {here:.1f} tokens here, of {there:.1f} in full training.")
        )
    parts.append("")
    trained, total = report["trainable_parameters"], report["total_parameters"]
    share = f"{trained:,} of {total:,} parameters trained ({_percent(trained / total)})"
    parts.append(Text(f"{share}, a patch of {bytes_text(report['patch_bytes'])}."))
    if report.get("probe"):
        parts.append(Text(f"Choice of blocks: {report['probe']}."))
    if report.get("seed") is not None:
        parts.append(Text(f"Seed {report['seed']}."))
    return Group(*parts)


def probe_table(probe: Mapping[str, Any]) -> RenderableType:
    """The ranking of the blocks with intervals on a common scale.

    Args:
        probe: a probe.json.
    """
    rows = sorted(probe["blocks"], key=lambda row: row["rank"])
    selected = set(probe["selected"])
    bounds = [
        value for row in rows for key in ("low", "score", "high") if (value := _finite(row[key])) is not None
    ]
    dearest = max((row["step_cost"] for row in rows if _finite(row["step_cost"])), default=None)
    contributions = any(row["contribution"] is not None for row in rows)

    table = _table()
    table.add_column("", no_wrap=True)
    scale = _scale(max((abs(value) for value in bounds), default=1.0))
    score = "score" if scale == 1 else f"score, {scale:.0e}"
    for name in ("rank", "block", score, "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if contributions:
        table.add_column("C(k)", justify="right", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    for row in rows:
        cost = _finite(row["step_cost"])
        cells: list[RenderableType] = [
            "*" if row["block"] in selected else "",
            str(row["rank"]),
            str(row["block"]),
            _number(row["score"], scale),
            f"{_number(row['low'], scale)} to {_number(row['high'], scale)}",
            IntervalBar(row["score"], row["low"], row["high"], min(bounds), max(bounds)) if bounds else "",
        ]
        if contributions:
            cells.append(_number(row["contribution"]))
        cells.append("-" if cost is None or not dearest else f"{cost / dearest:.0%}")
        table.add_row(*cells, style="bold" if row["block"] in selected else None)

    heading = Text(f"{probe['model']} on {probe['task']}", style="bold")
    return Group(heading, "", table, "", *(Text(note) for note in _probe_notes(probe, rows)))


class IntervalBar:
    """An interval with its value on a common scale, `BAR_WIDTH` characters wide.

    Args:
        value, low, high: what to draw; without finite bounds only the value.
        scale_low, scale_high: what the ends of the bar stand for.
    """

    def __init__(
        self, value: float | None, low: float | None, high: float | None, scale_low: float, scale_high: float
    ) -> None:
        self._value, self._low, self._high = _finite(value), _finite(low), _finite(high)
        self._scale_low, self._span = scale_low, scale_high - scale_low

    def text(self, *, ascii_only: bool) -> str:
        """The bar as characters."""
        line, point = ("-", "o") if ascii_only else ("─", "●")
        cells = [" "] * BAR_WIDTH
        if self._low is not None and self._high is not None:
            for place in range(self._place(self._low), self._place(self._high) + 1):
                cells[place] = line
        if self._value is not None:
            cells[self._place(self._value)] = point
        return "".join(cells)

    def _place(self, value: float) -> int:
        share = (value - self._scale_low) / self._span if self._span > 0 else 0.5
        return min(BAR_WIDTH - 1, max(0, round(share * (BAR_WIDTH - 1))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.text(ascii_only=options.ascii_only))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(BAR_WIDTH, BAR_WIDTH)


def _quality(report: Mapping[str, Any]) -> Group:
    kinds = {"greedy": report["quality"], "sampled": report["sampled"], "unquantized": report.get("deployed")}
    shown = {name: quality for name, quality in kinds.items() if quality}
    scores = [quality[when]["score"] for quality in shown.values() for when in ("before", "after")]
    fractions = all(0 <= score <= 1 for score in scores)
    table = _table()
    table.add_column("score", no_wrap=True)
    for name in ("before", "after", "gain, points" if fractions else "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, quality in shown.items():
        table.add_row(
            name,
            _with_interval(quality["before"], "score", fractions),
            _with_interval(quality["after"], "score", fractions),
            _with_interval(quality["gain"], "value", fractions, signed=True),
        )
    notes = [f"In brackets: 95% intervals over {report['quality']['after']['n']:,} held-out problems."]
    if "unquantized" in shown:
        notes.append("Unquantized: greedy on the original weights, with the trained blocks put in.")
    return Group(table, *(Text(note) for note in notes), "")


def _with_interval(figures: Mapping[str, Any], key: str, fractions: bool, *, signed: bool = False) -> str:
    value, low, high = (_finite(figures[name]) for name in (key, "low", "high"))
    sign = "+" if signed else ""
    if value is None:
        return "-"
    if fractions:
        text = f"{100 * value:{sign}.1f}{'' if signed else '%'}"
        return (
            text
            if low is None or high is None
            else f"{text} ({100 * low:{sign}.0f} to {100 * high:{sign}.0f})"
        )
    text = f"{value:{sign}.3g}"
    return text if low is None or high is None else f"{text} ({low:{sign}.2g} to {high:{sign}.2g})"


def _savings(report: Mapping[str, Any]) -> Table:
    time, memory = report["time"], report["memory"]
    table = _table()
    table.add_column("training", no_wrap=True)
    table.add_column("midtune, measured", justify="right", no_wrap=True)
    table.add_column("full training", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    full_step = _finite(time["full_step"])
    full = "-" if full_step is None else f"{seconds_text(full_step)}, {time['full_source']}"
    speed = "" if time["speedup"] is None else _speed(time["speedup"])
    compared = _finite(time.get("compared_step"))
    if compared is not None:
        # Completions grow or shrink as a model learns, so only the same prompts compare.
        table.add_row("time per step, first prompts", seconds_text(compared), full, speed)
        full = speed = ""
    whole = "time per step" if compared is None else "time per step, mean"
    table.add_row(whole, seconds_text(time["step"]), full, speed)
    for phase in ("rollout", "reward", "update"):
        table.add_row(f"  {phase}", seconds_text(time[phase]), "", "")
    full_peak = memory["full_peak"]
    table.add_row(
        f"peak memory ({MEMORY_SOURCES[memory['source']]})",
        bytes_text(memory["peak"]),
        "-" if full_peak is None else f"{bytes_text(full_peak)}, {memory['full_source']}",
        "" if memory["saving"] is None else _saving(memory["saving"]),
    )
    return table


def _speed(speedup: float) -> str:
    return f"{speedup:.1f}x faster" if speedup >= 1 else f"{1 / speedup:.1f}x slower"


def _saving(saving: float) -> str:
    return f"{_percent(abs(saving))} {'less' if saving >= 0 else 'more'}"


def _probe_notes(probe: Mapping[str, Any], rows: list[Any]) -> Iterable[str]:
    took = seconds_text(probe["cost_seconds"])
    yield f"* selected. {len(rows)} blocks ranked by the {probe['method']} method in {took}."
    best, *others = rows
    low = _finite(best["low"])
    if low is not None and others:
        close = sum(1 for row in others if (high := _finite(row["high"])) is not None and high >= low)
        reach = f"Blocks whose interval reaches that of block {best['block']}: {close} of {len(others)}."
        yield f"{reach} The order among them is not settled." if close else reach
    depth = probe.get("depth_baseline")
    if depth:
        yield f"Position alone would take block {depth['block']} (score {depth['score']:.3g})."
    yield "Cost: time of a training step, relative to the dearest block here."


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _minutes_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _percent(fraction: float) -> str:
    return f"{fraction:.{1 if abs(fraction) < 0.1 else 0}%}"


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _scale(largest: float) -> float:
    """The power of ten to divide by so that three decimals say something about scores up to `largest`."""
    return 1.0 if largest == 0 or 0.1 <= largest < 100 else 10.0 ** math.floor(math.log10(largest))


def _number(value: Any, scale: float = 1.0) -> str:
    figure = _finite(value)
    return "-" if figure is None else f"{figure / scale:.3f}"
