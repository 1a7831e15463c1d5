"""The report of a run as tables for a terminal of 80 columns, a pipe or a log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from midtune.report.formats import (
    blocks_text,
    bytes_text,
    finite,
    interval_texts,
    percent_text,
    saving_text,
    seconds_text,
    share_text,
    speed_text,
    with_interval,
)
from midtune.report.summary import COMPARED, PHASES, are_fractions, score_kinds

MEMORY_SOURCES = {"cuda_allocated": "CUDA tensors", "resident": "process"}


def plain_table(*texts: str, numbers: Sequence[str] = (), rows: Iterable[Sequence[str]] = ()) -> Table:
    """A frameless table: `texts` columns left-aligned, then `numbers` right-aligned; cells fold and hold no markup."""
    columns = [Column(name, overflow="fold") for name in texts]
    columns += [Column(name, overflow="fold", justify="right") for name in numbers]
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def titled(title: str, *parts: RenderableType) -> Group:
    """A bold title, and tables and texts below it; brackets in texts are no markup."""
    shown = (Text(part) if isinstance(part, str) else part for part in parts)
    return Group(Text(title, style="bold"), *shown)


def labelled(rows: Iterable[Sequence[RenderableType]], labels: int = 1) -> Table:
    """Rows of `labels` short labels each, and a text at the end that may take several lines."""
    columns = [*(Column(no_wrap=True) for _ in range(labels)), Column(overflow="fold")]
    table = Table.grid(*columns, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """Show a report.json: what a run gained and saved."""
    title = f"{report['model']} on {report['task']}: {blocks_text(report['blocks'])} trained"
    trained, total = report["trainable_parameters"], report["total_parameters"]
    notes = [
        f"{trained:,} of {total:,} parameters trained ({percent_text(trained / total)}), "
        f"a patch of {bytes_text(report['patch_bytes'])}."
    ]
    if report.get("probe"):
        notes.append(f"Choice of blocks: {report['probe']}.")
    if report.get("seed") is not None:
        notes.append(f"Seed {report['seed']}.")
    notes += report.get("notes", ())
    return titled(title, "", *_quality(report), "", *_savings(report), "", *notes)


def held_bytes(memory: Mapping[str, Any], arm: str = "") -> int | None:
    """Peak bytes of the run, or of `full_` or `qlora_` training, above the libraries; older reports count those too."""
    peak = memory.get(f"{arm}peak")
    return None if peak is None else peak - (memory.get(f"{arm}libraries") or 0)


def more_text(report: Mapping[str, Any]) -> str:
    """What one more block would have cost; empty if that is not known."""
    more, held = report.get("one_more_block"), held_bytes(report["memory"])
    if not more or not held:
        return ""
    shares = [share_text(more["step"], report["time"]["step"]), share_text(more["peak"], held)]
    return (
        f"With block {more['block']} too, a step would take {seconds_text(more['step'])} ({shares[0]}) and "
        f"{bytes_text(more['peak'])} ({shares[1]}) more, estimated."
    )


def _quality(report: Mapping[str, Any]) -> Iterable[RenderableType]:
    shown = score_kinds(report)
    fractions = are_fractions(shown)
    columns = ("before", "after", "gain, points" if fractions else "gain")
    rows = [
        [name, *(with_interval(*interval_texts(found[part], fractions)) for part in COMPARED)]
        for name, found in shown.items()
    ]
    yield plain_table("score", numbers=columns, rows=rows)
    yield f"In brackets: 95% intervals over {report['quality']['after']['n']:,} held-out problems."
    if "unquantized" in shown:
        yield "Greedy and sampled: on the model as it was trained."
        yield "Unquantized: greedy on the original weights, with the trained blocks put in."


def _savings(report: Mapping[str, Any]) -> Iterable[RenderableType]:
    time, memory = report["time"], report["memory"]
    full_step, compared = finite(time["full_step"]), finite(time.get("compared_step"))
    versus_full = (
        "-" if full_step is None else f"{seconds_text(full_step)}, {time['full_source']}",
        "" if time["speedup"] is None else speed_text(time["speedup"]),
    )
    rows = [("time per step", seconds_text(time["step"]), *(versus_full if compared is None else ("", "")))]
    rows += [(f"  {phase}", seconds_text(time[phase]), "", "") for phase in PHASES]
    if compared is not None:
        # Completion lengths change as a model learns, so only steps on the same prompts compare.
        rows.append(("  on the first prompts", seconds_text(compared), *versus_full))
    held, full_held, saved = held_bytes(memory), held_bytes(memory, "full_"), memory["saving"]
    peak = "-" if full_held is None else f"{bytes_text(full_held)}, {memory['full_source']}"
    rows.append(("peak memory", bytes_text(held or 0), peak, "" if saved is None else saving_text(saved)))
    yield plain_table("training", numbers=("midtune, measured", "full training", ""), rows=rows)
    libraries = memory.get("libraries")
    above = f", above the {bytes_text(libraries)} before the model was loaded" if libraries else ""
    yield f"Peak memory is that of the {MEMORY_SOURCES[memory['source']]}{above}."
    if more := more_text(report):
        yield more
    if (here := finite(time.get("compared_tokens"))) and (there := finite(time.get("full_tokens"))):
        yield f"First prompts: completions of {here:.1f} tokens here, of {there:.1f} in full training."
