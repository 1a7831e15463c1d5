"""The results of the smaller commands as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midtune.report.tables import bytes_text, seconds_text


def score_table(result: Mapping[str, Any]) -> RenderableType:
    """Scores with 95% intervals.

    Args:
        result: what `midtune eval` found: `model`, `patch`, `task`, `quantize`, `greedy`, `sampled`.
    """
    blocks = result["patch"]
    patch = f" with trained blocks {', '.join(map(str, blocks))}" if blocks else ""
    held = "unquantized" if result["quantize"] == "none" else result["quantize"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "score", "95% interval", "problems"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for kind in ("greedy", "sampled"):
        if (found := result[kind]) is not None:
            interval = f"{found['low']:.3f} to {found['high']:.3f}"
            table.add_row(kind, f"{found['score']:.3f}", interval, str(found["n"]))
    return Group(Text(f"{result['model']}{patch} ({held}) on {result['task']}", style="bold"), table)


def merge_text(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune merge` wrote: `folder`, `tensors`, `bytes`."""
    return Text(f"{result['folder']}: {result['tensors']} tensors replaced, {bytes_text(result['bytes'])}.")


def bench_table(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune bench` measured: seconds and bytes of each arm, and how many times the first arm's."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "sampling", "update", "step", "memory"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm in result["arms"]:
        ratios = arm["ratios"] or {}
        cells = {
            **{phase: seconds_text(arm[phase]["median"]) for phase in ("rollout", "update", "step")},
            "memory": bytes_text(arm["peak"] - arm["libraries"]),
        }
        own = arm is result["arms"][0]
        table.add_row(
            arm["arm"],
            *(f"{cell}{_times(ratios.get(phase), own)}" for phase, cell in cells.items()),
        )
    for arm in result["failed"]:
        table.add_row(arm, "-", "-", "-", "failed")
    steps = f"medians of {result['steps']} steps"
    work = (
        f"{result['prompts']} prompts x {result['group_size']} completions of {result['new_tokens']} tokens"
    )
    notes = [
        f"{work}, {steps}; memory is the peak without the libraries.",
        "Least and greatest seconds are in bench.json. TRL runs with its defaults.",
    ]
    notes += [_profile_text(phase, seconds, result) for phase, seconds in result.get("profile", {}).items()]
    if any(arm["ratios"] is None for arm in result["arms"]):
        notes.append("An arm without a ratio did not do the same work.")
    notes += [f"{why[:1].upper()}{why[1:]}" for why in result["failed"].values()]
    heading = Text(f"{result['model']}, block {result['block']}", style="bold")
    return Group(heading, "", table, *(Text(note) for note in notes))


def _profile_text(phase: str, seconds: Mapping[str, float], result: Mapping[str, Any]) -> str:
    """Shares of a phase by kind of work, the largest first, and what the machine's peak would make of it."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{kind} {part / total:.0%}" for kind, part in ordered if part >= 0.005 * total)
    name = {"rollout": "Sampling", "update": "Update"}[phase]
    peak = result["peak_flops_per_s"]
    floor = ""
    if phase in result["flops"]:
        least = seconds_text(result["flops"][phase] / peak)
        floor = f"; at this machine's {peak / 1e9:,.0f} GFLOP/s the products with weights would take {least}"
    return f"{name} of {result['arms'][0]['arm']}, profiled at {seconds_text(total)}: {shares}{floor}."


def _times(ratio: float | None, own: bool) -> str:
    return "" if ratio is None or own else f" ({ratio:.1f}x)"


def tasks_text(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune tasks` found: names, one a line, or a problem with the arguments it came from."""
    if "tasks" in result:
        return Text("\n".join(result["tasks"]))
    arguments = [f"  {key}={value}" for key, value in result["arguments"].items()]
    return Group(
        Text(result["task"], style="bold"),
        Text("\n".join(arguments)),
        Text("\nproblem", style="bold"),
        Text(result["question"]),
        Text("\nanswer", style="bold"),
        Text(result["answer"]),
    )
