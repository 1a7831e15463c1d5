"""Pictures of a run, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The mean over this share of a run smooths the reward of single steps, which is mostly the luck of its prompts.
SMOOTHED_SHARE = 0.1
KINDS = {"quality": ("greedy", "o", "tab:blue"), "sampled": ("sampled", "s", "tab:orange")}


def learning_curve(metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any], file: Path) -> None:
    """Draw the reward of every step, and the held-out scores before and after with their 95% intervals.

    Args:
        metrics: lines of metrics.jsonl.
        report: what report.json holds.
        file: where the picture goes; its suffix says the format.
    """
    import numpy as np
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in metrics])
    rewards = np.array([line["reward"] for line in metrics], dtype=float)
    width = max(1, round(len(steps) * SMOOTHED_SHARE))
    smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="0.8", linewidth=0.8)
    axes.plot(steps[width - 1 :], smooth, color="0.35", label=f"training reward, mean of {width} steps")
    margin = 0.02 * (steps[-1] - steps[0] + 1)
    for place, (key, (name, marker, color)) in enumerate(KINDS.items(), 1):
        if report[key] is None:
            continue
        for when, x in (("before", steps[0] - place * margin), ("after", steps[-1] + place * margin)):
            score = report[key][when]
            axes.errorbar(
                x,
                score["score"],
                yerr=[[score["score"] - score["low"]], [score["high"] - score["score"]]],
                fmt=marker,
                color=color,
                capsize=3,
                label=f"held-out score, {name}" if when == "before" else None,
            )
    blocks = ", ".join(map(str, report["blocks"]))
    axes.set_title(
        f"{report['model']} on {report['task']}, block{'s' * (len(report['blocks']) > 1)} {blocks}",
        fontsize=10,
    )
    axes.set_xlabel("step")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
