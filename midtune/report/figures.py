"""Figures of the report page: SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from midtune.report.depth import points
from midtune.report.plots import over_steps, panels, smoothed

# matplotlib's colours, and the page's style variables that replace them.
COLOURS = {
    "#000000": "ink",
    "#595959": "ink",
    "#808080": "muted",
    "#a6a6a6": "muted",
    "#cccccc": "faint",
    "#f5f5f5": "shade",
    "#1f77b4": "blue",
    "#ff7f0e": "orange",
    "#2ca02c": "green",
    "#9467bd": "purple",
    "#e377c2": "pink",
    "#17becf": "cyan",
}
LINE_COLOURS = ("blue", "orange", "green", "purple", "pink", "cyan")
# Dashes tell lines of one colour apart; in units of the line width.
DASHES = ("", "4 2", "1 2")


def metric_curve(metrics: Sequence[Mapping[str, Any]], key: str) -> str:
    """A figure of one metric: each step's value and the running mean."""

    def draw(axes: Any) -> None:
        steps, values, means = smoothed(metrics, key)
        axes.plot(steps, values, color="0.8", linewidth=0.8, marker="." if len(steps) == 1 else None)
        axes.plot(steps, means, color="tab:blue", linewidth=1.5)
        over_steps(axes)

    return _embedded(key, draw)


def reward_curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """A figure of the smoothed rewards of several runs, in the styles of `line_style`."""

    def draw(axes: Any) -> None:
        hex_of = {name: colour for colour, name in COLOURS.items()}
        for number, metrics in enumerate(runs):
            name, dashes = line_style(number)
            steps, _, means = smoothed(metrics, "reward")
            pattern = (0, [float(part) for part in dashes.split()]) if dashes else "-"
            axes.plot(steps, means, color=hex_of[name], linewidth=1.5, linestyle=pattern)
        over_steps(axes)

    return _embedded("rewards", draw)


def ranking_curves(probe: Mapping[str, Any]) -> list[str]:
    """Figures of the `panels` of a probe.json; none without finite values."""
    drawn = panels(probe) if points(probe) else {}
    return [_embedded(name, draw, taller=0.7) for name, draw in drawn.items()]


def line_style(number: int) -> tuple[str, str]:
    """Colour and dash pattern of a line by its number, from 0."""
    return LINE_COLOURS[number % len(LINE_COLOURS)], DASHES[number // len(LINE_COLOURS) % len(DASHES)]


def _embedded(name: str, draw: Callable[[Any], None], *, taller: float = 0.0) -> str:
    """Draw an SVG element for a page; `name` makes its ids unique there, `taller` is in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": name, "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context(settings):
        # Inches; about as wide as a phone, so that its text is as large as the page's.
        figure = Figure(figsize=(4.6, 2.7 + taller), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    # A page knows the namespaces, and a style for all elements would apply to the whole page.
    inner = drawn[drawn.index("<g ") : drawn.rindex("</svg>")]
    inner = re.sub(r'\bid="|url\(#|href="#', lambda match: f"{match[0]}{name}-", inner)
    inner = re.sub(r" font-family: [^;\"]*;", "", inner)
    for colour, variable in COLOURS.items():
        inner = inner.replace(colour, f"var(--{variable})")
    return f'<svg {box[0]} aria-hidden="true">{inner}</svg>'
