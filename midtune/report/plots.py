"""Plots of runs and rankings; the suffix of a `file` says the format."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from midtune.report.depth import depth_of, frontier, full_training, plateau_of, points, priced, value_name
from midtune.report.formats import blocks_text, finite
from midtune.report.summary import score_kinds
from midtune.whole import write_bytes

# Average over this share of a run: the reward of a single step is mostly the luck of its prompts.
SMOOTHED_SHARE = 0.1
KINDS = {"greedy": ("o", "tab:blue"), "sampled": ("s", "tab:orange")}
# Marker and colour, the later on top.
BLOCK_KINDS = {
    "block": ("o", "0.65"),
    "not told apart from the best": ("o", "tab:blue"),
    "selected": ("D", "tab:orange"),
}


def learning_curve(metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any], file: Path) -> None:
    """Draw the reward of every step, and the held-out scores before and after with their 95% intervals."""
    from matplotlib.figure import Figure

    steps, rewards, means = smoothed(metrics, "reward")
    width = smoothing_width(len(steps))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="0.8", linewidth=0.8)
    label = f"training reward, mean of {width} steps"
    axes.plot(steps[width - 1 :], means[width - 1 :], color="0.35", label=label)
    first, last = metrics[0]["step"], metrics[-1]["step"]
    margin = 0.02 * (last - first + 1)
    scored = score_kinds(report)
    for place, (name, (marker, color)) in enumerate(KINDS.items(), 1):
        if name in scored:
            ends = (scored[name][when] for when in ("before", "after"))
            values = [(score["score"], score["low"], score["high"]) for score in ends]
            places = (first - place * margin, last + place * margin)
            label = f"held-out score, {name}"
            _intervals(axes, places, values, fmt=marker, color=color, label=label, capsize=3)
    title = f"{report['model']} on {report['task']}, {blocks_text(report['blocks'])}"
    axes.set_title(title, fontsize=10, parse_math=False)
    over_steps(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, file)


def smoothing_width(steps: int) -> int:
    """How many steps to average over."""
    return max(1, round(steps * SMOOTHED_SHARE))


def smoothed(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float], list[float]]:
    """Steps, their values and running means of the values; steps without a value are left out."""
    known = [(line["step"], value) for line in metrics if (value := finite(line.get(key))) is not None]
    values = [value for _, value in known]
    width = smoothing_width(len(known))
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [step for step, _ in known], values, [sum(window) / len(window) for window in windows]


def over_steps(axes: Any) -> None:
    """Set up the axes of a curve over steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.spines[["top", "right"]].set_visible(False)


def contribution_curve(probe: Mapping[str, Any], file: Path) -> None:
    """Draw the `panels` of a ranking side by side."""
    from matplotlib.figure import Figure

    drawn = panels(probe)
    figure = Figure(figsize=(10 if len(drawn) > 1 else 7, 4), layout="constrained")
    for place, draw in enumerate(drawn.values(), 1):
        draw(figure.add_subplot(1, len(drawn), place))
    figure.suptitle(f"{probe['model']} on {probe['task']}, {probe['method']}", fontsize=10, parse_math=False)
    _save(figure, file)


def clock_curve(result: Mapping[str, Any], file: Path) -> None:
    """Draw the held-out score of every arm of `midtune bench --until` against minutes, with its 95% interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for arm in result["arms"]:
        minutes = [point["seconds"] / 60 for point in arm["points"]]
        lr = arm["lr"] if isinstance(arm["lr"], str) else f"{arm['lr']:.2g}"
        scores, low, high = ([point[key] for point in arm["points"]] for key in ("score", "low", "high"))
        (line,) = axes.plot(minutes, scores, marker="o", markersize=3, label=f"{arm['arm']}, rate {lr}")
        axes.fill_between(minutes, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    if result["target"] is not None:
        axes.axhline(result["target"], color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("held-out score and 95% interval")
    axes.set_title(f"{result['model']} on {result['task']}", fontsize=10, parse_math=False)
    _finish(axes)
    _save(figure, file)


def rankings_curve(rankings: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw rankings by name over relative depth k/(L−1), each with mean 0 and standard deviation 1."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="0.8", linewidth=0.8)
    for name, probe in rankings.items():
        known = points(probe)
        values = np.array([point.value for point in known])
        spread = values.std() if len(values) else 0.0
        depths = [point.block / max(depth_of(probe) - 1, 1) for point in known]
        heights = (values - values.mean()) / spread if spread > 0 else values * 0
        label = f"{name}: {value_name(probe)}"
        axes.plot(depths, heights, marker="o", markersize=3, linewidth=1, label=label)
    axes.set_xlabel("relative depth")
    axes.set_ylabel("standard deviations from the mean")
    _finish(axes, columns=1)
    _save(figure, file)


def panels(probe: Mapping[str, Any]) -> dict[str, Callable[[Any], None]]:
    """Functions that draw a ranking: values by depth and, if gains were measured, gains against costs."""
    drawn: dict[str, Callable[[Any], None]] = {"depth": partial(_draw_depth, probe)}
    return {**drawn, "prices": partial(_draw_prices, probe)} if priced(probe) else drawn


def _draw_depth(probe: Mapping[str, Any], axes: Any) -> None:
    """Draw the value of every block by depth, with full training, the middle and the plateau."""
    from matplotlib.ticker import MaxNLocator

    axes.axhline(0, color="0.8", linewidth=0.8)
    if (full := full_training(probe)) is not None:
        value, low, high = full
        axes.axhline(value, color="tab:green", linewidth=0.8, label="full training")
        if low is not None and high is not None:
            axes.axhspan(low, high, color="tab:green", alpha=0.1, linewidth=0)
    if (middle := (probe.get("depth_baseline") or {}).get("block")) is not None:
        axes.axvline(middle, color="0.5", linewidth=0.8, linestyle=":", label="middle")
    if stretch := plateau_of(probe):
        axes.axvspan(stretch[0] - 0.5, stretch[-1] + 0.5, color="0.96", zorder=0, label="above half height")
    known = points(probe)
    kinds = {point.block: "block" for point in known}
    kinds |= dict.fromkeys(probe.get("among_best") or [], "not told apart from the best")
    kinds |= dict.fromkeys(probe.get("selected") or [], "selected")
    for kind, (marker, color) in BLOCK_KINDS.items():
        if group := [point for point in known if kinds[point.block] == kind]:
            values = [(point.value, point.low, point.high) for point in group]
            places = [point.block for point in group]
            _intervals(
                axes, places, values, label=kind, fmt=marker, color=color, markersize=5, elinewidth=0.8
            )
    axes.set_xlim(-0.5, depth_of(probe) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    measured = any(point.low is not None for point in known)
    axes.set_ylabel(value_name(probe) + (" and 95% interval" if measured else ""))
    _finish(axes)


def _draw_prices(probe: Mapping[str, Any], axes: Any) -> None:
    selected, best, blocks = set(probe.get("selected") or []), frontier(probe), priced(probe)
    for block, (gain, cost) in blocks.items():
        marker, color = BLOCK_KINDS["selected" if block in selected else "block"]
        axes.plot(cost, gain, marker, color=color, markersize=4, linestyle="")
    edge = sorted((cost, gain, block) for block, (gain, cost) in blocks.items() if block in best)
    costs, gains = [cost for cost, _, _ in edge], [gain for _, gain, _ in edge]
    axes.step(costs, gains, where="post", color="0.35", linewidth=0.8, label="most gain for the cost")
    for cost, gain, block in edge:
        axes.annotate(str(block), (cost, gain), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    full = probe.get("full") or {}
    if finite(full.get("score")) is not None and finite(full.get("step_cost")) is not None:
        place = full["step_cost"], full["score"]
        axes.plot(*place, "*", color="tab:green", linestyle="", label="full training")
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.set_xlabel("seconds per training step")
    axes.set_ylabel("gain")
    axes.margins(y=0.1)
    _finish(axes)


def _finish(axes: Any, columns: int = 3) -> None:
    """Remove the frame's top and right, and put the legend below, where it hides no block."""
    axes.legend(frameon=False, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes.spines[["top", "right"]].set_visible(False)


def _intervals(
    axes: Any, places: Sequence[float], values: Sequence[tuple[float | None, ...]], **style: Any
) -> None:
    """Draw (value, low, high) at each place, in the `style` of `errorbar`."""
    import numpy as np

    value, low, high = np.array(values, dtype=float).T
    # A bootstrap interval need not contain the value.
    reach = np.maximum([value - low, high - value], 0)
    axes.errorbar(places, value, yerr=reach, **style)


def _save(figure: Any, file: Path) -> None:
    """Write a figure; equal figures give equal bytes."""
    import matplotlib

    date = "CreationDate" if file.suffix.lower() == ".pdf" else "Date"
    with matplotlib.rc_context({"svg.hashsalt": "midtune"}):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=file.suffix.lower().removeprefix("."), metadata={date: None})
    write_bytes(file, drawn.getvalue())
