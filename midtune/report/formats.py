"""Figures as text for people: bytes, seconds, shares, scores with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from midtune.measure.cards import Card, CardProcess


def finite(value: Any) -> float | None:
    """A finite number, or None."""
    return None if value is None or not math.isfinite(value) else float(value)


def bytes_text(count: float) -> str:
    """A number of bytes: `1.25 GiB`, `13.5 MiB`, `512 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """A duration: `12 ms`, `2.31 s`, `45.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 0.1:
        return f"{seconds * 1000:.{0 if seconds >= 0.001 or seconds == 0 else 2}f} ms"
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    return _minutes_text(seconds)


def whole_seconds_text(seconds: float) -> str:
    """A running or estimated duration, without false precision: `8 s`, `1 min 20 s`."""
    return f"{math.ceil(seconds)} s" if math.ceil(seconds) < 60 else _minutes_text(seconds)


def percent_text(fraction: float) -> str:
    """A fraction in percent, with one decimal if small."""
    return f"{fraction:.{1 if abs(fraction) < 0.1 else 0}%}"


def share_text(part: float | None, whole: float = 1.0) -> str:
    """A part of a whole in percent, or `-` if unknown."""
    found = finite(part)
    return "-" if found is None or not whole else f"{found / whole:.0%}"


def speed_text(speedup: float) -> str:
    """How many times faster, or slower if `speedup` is below 1."""
    return f"{speedup:.1f}x faster" if speedup >= 1 else f"{1 / speedup:.1f}x slower"


def saving_text(saving: float) -> str:
    """How much less, or more if the fraction `saving` is negative."""
    return f"{percent_text(abs(saving))} {'less' if saving >= 0 else 'more'}"


def numbers_text(numbers: Sequence[int]) -> str:
    """Numbers in a row: `2, 3`."""
    return ", ".join(map(str, numbers))


def blocks_text(blocks: Sequence[int]) -> str:
    """Blocks by their numbers: `block 15`, `blocks 2, 3`."""
    return f"block{'s' * (len(blocks) > 1)} {numbers_text(blocks)}"


def sentence(text: str) -> str:
    """Capitalize the first letter."""
    return f"{text[:1].upper()}{text[1:]}"


def card_text(card: Card) -> str:
    """A card's free memory, and what else uses it."""
    free = f"{card.name}, {bytes_text(card.free_bytes)} of {bytes_text(card.total_bytes)} free"
    return free + (f"; also in use by {processes_text(card.others)}" if card.others else "")


def processes_text(processes: Sequence[CardProcess]) -> str:
    """Processes and their memory on a card: `ollama (7) 18.00 GiB, process (9)`."""
    return ", ".join(
        f"{process.name} ({process.pid})"
        + ("" if process.held_bytes is None else f" {bytes_text(process.held_bytes)}")
        for process in processes
    )


def known(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The finite numbers under a key of rows."""
    return [value for row in rows if (value := finite(row.get(key))) is not None]


def interval_text(figures: Mapping[str, Any], spec: str = ".3f", unit: float = 1.0) -> str:
    """The interval `low` to `high` in units of `unit`, such as `0.391 to 0.508`; empty if unknown."""
    low, high = finite(figures.get("low")), finite(figures.get("high"))
    return "" if low is None or high is None else f"{low / unit:{spec}} to {high / unit:{spec}}"


def with_interval(value: str, interval: str) -> str:
    """A figure with its interval in brackets, if known."""
    return f"{value} ({interval})" if interval else value


def interval_texts(figures: Mapping[str, Any], fractions: bool) -> tuple[str, str]:
    """A `score` or a gain's `value`, and its interval: `45.0%` and `39 to 51`; `fractions` gives percents or points."""
    signed = "value" in figures
    value, sign = finite(figures["value" if signed else "score"]), "+" if signed else ""
    if value is None:
        return "-", ""
    if fractions:
        text = f"{100 * value:{sign}.1f}{'' if signed else '%'}"
        return text, interval_text(figures, f"{sign}.0f", unit=0.01)
    return f"{value:{sign}.3g}", interval_text(figures, f"{sign}.2g")


def _minutes_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
