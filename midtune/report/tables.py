"""The report as tables for a terminal of 80 columns, a pipe or a log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midtune.measure.cards import Card, CardProcess
from midtune.report.depth import finite

MEMORY_SOURCES = {"cuda_allocated": "CUDA tensors", "resident": "process"}


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


def card_text(card: Card) -> str:
    """How much of a card is free, and what else uses it."""
    free = f"{card.name}, {bytes_text(card.free_bytes)} of {bytes_text(card.total_bytes)} free"
    return free + (f"; also in use by {processes_text(card.others)}" if card.others else "")


def processes_text(processes: Sequence[CardProcess]) -> str:
    """Processes and what they hold of a card: `ollama (7) 18.00 GiB, process (9)`."""
    return ", ".join(
        f"{process.name} ({process.pid})"
        + ("" if process.held_bytes is None else f" {bytes_text(process.held_bytes)}")
        for process in processes
    )


def plain_table() -> Table:
    """An empty table without a frame."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


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
    if finite(report["time"].get("full_tokens")) and finite(report["time"].get("compared_tokens")):
        here, there = (report["time"][key] for key in ("compared_tokens", "full_tokens"))
        parts.append(
            Text(f"First prompts: completions of {here:.1f} tokens here, of {there:.1f} in full training.")
        )
    parts.append("")
    trained, total = report["trainable_parameters"], report["total_parameters"]
    share = f"{trained:,} of {total:,} parameters trained ({percent_text(trained / total)})"
    parts.append(Text(f"{share}, a patch of {bytes_text(report['patch_bytes'])}."))
    if report.get("probe"):
        parts.append(Text(f"Choice of blocks: {report['probe']}."))
    if report.get("seed") is not None:
        parts.append(Text(f"Seed {report['seed']}."))
    parts += [Text(note) for note in report.get("notes", ())]
    return Group(*parts)


def score_kinds(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was scored before and after, by name: `greedy` and, where they were taken, `sampled`, `unquantized`."""
    kinds = {"greedy": report["quality"], "sampled": report["sampled"], "unquantized": report.get("deployed")}
    return {name: quality for name, quality in kinds.items() if quality}


def are_fractions(kinds: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all scores lie between 0 and 1, so that they can be given in percent."""
    scores = [quality[when]["score"] for quality in kinds.values() for when in ("before", "after")]
    return all(0 <= score <= 1 for score in scores)


def interval_texts(
    figures: Mapping[str, Any], key: str, fractions: bool, *, signed: bool = False
) -> tuple[str, str]:
    """A score or gain and its 95% interval as a person reads them, such as `45.0%` and `39 to 51`.

    Args:
        figures: `key`, `low` and `high`.
        fractions: give percents, of a gain points.
    """
    value, low, high = (finite(figures[name]) for name in (key, "low", "high"))
    sign = "+" if signed else ""
    if value is None:
        return "-", ""
    text = f"{100 * value:{sign}.1f}{'' if signed else '%'}" if fractions else f"{value:{sign}.3g}"
    if low is None or high is None:
        return text, ""
    if fractions:
        return text, f"{100 * low:{sign}.0f} to {100 * high:{sign}.0f}"
    return text, f"{low:{sign}.2g} to {high:{sign}.2g}"


def _quality(report: Mapping[str, Any]) -> Group:
    shown = score_kinds(report)
    fractions = are_fractions(shown)
    table = plain_table()
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
    value, interval = interval_texts(figures, key, fractions, signed=signed)
    return f"{value} ({interval})" if interval else value


def _savings(report: Mapping[str, Any]) -> Table:
    time, memory = report["time"], report["memory"]
    table = plain_table()
    table.add_column("training", no_wrap=True)
    table.add_column("midtune, measured", justify="right", no_wrap=True)
    table.add_column("full training", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    full_step = finite(time["full_step"])
    full = "-" if full_step is None else f"{seconds_text(full_step)}, {time['full_source']}"
    speed = "" if time["speedup"] is None else speed_text(time["speedup"])
    compared = finite(time.get("compared_step"))
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
        "" if memory["saving"] is None else saving_text(memory["saving"]),
    )
    return table


def speed_text(speedup: float) -> str:
    """How many times faster, or slower where `speedup` is below 1."""
    return f"{speedup:.1f}x faster" if speedup >= 1 else f"{1 / speedup:.1f}x slower"


def saving_text(saving: float) -> str:
    """How much less, or more where the fraction `saving` is negative."""
    return f"{percent_text(abs(saving))} {'less' if saving >= 0 else 'more'}"


def _minutes_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent_text(fraction: float) -> str:
    """A fraction in percent, with a decimal where it is small."""
    return f"{fraction:.{1 if abs(fraction) < 0.1 else 0}%}"
