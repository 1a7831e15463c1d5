"""The results of the smaller commands as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midtune.report.tables import bytes_text


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
