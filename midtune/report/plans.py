"""Memory and time that training would take, for a terminal of 80 columns, a pipe or a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from midtune.report.formats import blocks_text, bytes_text, numbers_text, seconds_text
from midtune.report.tables import labelled, plain_table, titled

BAR = 30


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """Show `midtune plan`: the peak of each way to train, where it goes, and what fits."""
    work, arms, fitted = plan["work"], plan["arms"], plan["fitted"]
    asked = (
        f"{plan['parameters'] / 1e9:.2f} billion parameters in {plan['num_blocks']} blocks; midtune trains "
        f"{blocks_text(plan['blocks'])}. A step: {work['prompts']} prompts of {work['prompt_tokens']:,} tokens x "
        f"{work['group_size']} completions of {work['new_tokens']:,}."
    )
    compared = plain_table("way to train", numbers=("peak", "in", "fits", "step at best"))
    compared.add_row(*_row(fitted or arms[0], "midtune"), style="bold")
    for arm in arms[1:]:
        compared.add_row(*_row(arm, arm["label"]))
    if plan["fit"]:
        compared.add_row(*_row(arms[0], "midtune, not made to fit"))
    return titled(
        f"{plan['model']} on {plan['card']['name']}",
        asked,
        "",
        compared,
        "",
        "Where midtune's memory goes",
        _parts((fitted or arms[0])["phases"]),
        "",
        "Midtune's peak by the first block trained",
        _by_block(plan),
        "",
        *_advice(plan),
        *(_between(plan["between"]) if plan["between"] else ()),
    )


def _between(found: Mapping[str, Any]) -> Iterable[RenderableType]:
    sharded = found["sharded"]
    links = plain_table("between cards", numbers=("seconds a step", "of a step at best"))
    for link in found["links"]:
        share = "-" if math.isnan(link["share"]) else f"{link['share']:.1%}"
        links.add_row(link["name"], f"{link['seconds']:.3f}", share)
    yield from (
        "",
        f"Shared among {found['devices']} cards, as above on each with {found['prompts']} of the prompts",
    )
    yield from (links, "")
    yield (
        f"In a step each card sends {bytes_text(found['sent'])} to average a gradient of "
        f"{bytes_text(found['gradient'])}; training all parameters it would send {bytes_text(found['full_sent'])}. It "
        "waits meanwhile, since the gradient is done when the backward pass is: more than a tenth of a step at best "
        f"where cards send less than {found['least_speed'] / 1e9:.2f} GB a second."
    )
    yield (
        f"Each card holds all frozen blocks. To share them out (FSDP2) would save {bytes_text(sharded['saved'])} of a "
        f"card and send {bytes_text(sharded['sent'])} a step: every sampled token passes all blocks (estimated)."
    )


def _row(arm: Mapping[str, Any], label: str) -> tuple[str, ...]:
    seconds = sum(arm["seconds"].values())
    step = "-" if math.isnan(seconds) else seconds_text(seconds)
    return label, bytes_text(arm["peak"]), arm["phase"], "yes" if arm["fits"] else "no", step


def _parts(phases: Mapping[str, Mapping[str, int]]) -> Table:
    names = dict.fromkeys(name for parts in phases.values() for name, size in parts.items() if size)

    def row(name: str, sizes: Iterable[int]) -> list[str]:
        return [name, *(f"{size / 2**30:.2f}" if size else "-" for size in sizes)]

    rows = [row(name, (parts.get(name, 0) for parts in phases.values())) for name in names]
    table = plain_table("GiB", numbers=[*phases], rows=rows)
    table.add_row(*row("together", (sum(parts.values()) for parts in phases.values())), style="bold")
    return table


def _by_block(plan: Mapping[str, Any]) -> Table:
    """Peaks of about seven blocks as bars, the lowest and highest block included."""
    rows = plan["by_block"]
    highest = max(row["peak"] for row in rows)
    shown = rows[:: max(1, len(rows) // 6)]
    bars = []
    for row in shown if shown[-1] is rows[-1] else [*shown, rows[-1]]:
        bar = ProgressBar(total=highest, completed=row["peak"], width=BAR)
        fits = "" if row["peak"] <= plan["card"]["memory"] else "  does not fit"
        bars.append((f"{row['block']:>5}", bar, bytes_text(row["peak"]) + fits))
    return labelled(bars, labels=2)


def _advice(plan: Mapping[str, Any]) -> Iterable[str]:
    ours, card, largest = plan["arms"][0], plan["card"], plan["largest"]
    room = bytes_text(card["memory"])
    weights = sum(ours["phases"]["update"].get(part, 0) for part in ("frozen blocks", "embeddings and head"))
    if ours["fits"]:
        yield f"It fits as asked, with {bytes_text(card['memory'] - ours['peak'])} to spare."
    elif plan["fit"] is None and weights > card["memory"]:
        yield f"It does not fit in {room}: its frozen weights alone take {bytes_text(weights)}."
    elif plan["fit"] is None:
        yield (
            f"It does not fit in {room}, whatever is made leaner: the first thing to lower is --max-new-tokens or "
            "--group-size; a higher block (--layers) or a smaller model takes less."
        )
    else:
        settings = " ".join(f"--set {key}={str(value).lower()}" for key, value in plan["fit"].items())
        yield f"What makes it fit in {room} at the least price: {settings}"
        yield "`midtune train` finds that by itself on a card, from the memory that is free."
    yield from plan["notes"]
    if largest is not None:
        prompts = f"{largest['prompts']} prompt{'s' * (largest['prompts'] != 1)}"
        yield (
            f"With these settings about {prompts} could go through an update together, or a group "
            f"could have {largest['group_size']:,} completions, or a completion {largest['new_tokens']:,} tokens."
        )
    yield (
        "Peaks of midtune come from running its code without data, those of TRL from running the model and the head "
        "that TRL runs; CUDA's own 0.6 GiB is assumed. Times are bounds from the card's published peaks, no promise."
    )


def dry_run_text(found: Mapping[str, Any]) -> RenderableType:
    """Show `midtune train --dry-run`: a line for each thing that a run would do."""
    step, plan, scored = found["step"], found["plan"], found["evaluation"]
    downloads = list(found["downloads"])
    if found["weights_bytes"] is not None:
        downloads[0] += f", about {bytes_text(found['weights_bytes'])} (estimated, as bf16)"
    lines = {
        "model": f"{found['model']} ({found['quantize']})",
        "task": f"{found['task']}, reward {' + '.join(found['reward'] or ['of the task'])}",
        "algorithm": found["algorithm"],
        "blocks": found["layers"],
        "step": f"{step['prompts']} prompts x {step['group_size']} completions, at most {step['tokens']:,} new tokens",
        "steps": str(found["steps"]),
        "evaluation": f"{scored['problems']} problems, greedily and {scored['samples']} samples each, twice: "
        f"{scored['share']:.0%} of the run",
        "memory": found["note"],
    }
    if plan is not None:
        changed = ", ".join(f"{key}={str(value).lower()}" for key, value in plan["changes"].items())
        fits = (
            "does not fit"
            if not plan["fits"]
            else f"fits with {changed}, which --fit sets"
            if changed
            else "fits"
        )
        lines |= {
            "blocks": f"{numbers_text(plan['blocks'])}: {plan['trainable_parameters']:,} parameters trained",
            "memory": f"planned peak {bytes_text(plan['peak'])} in {plan['phase']}, prompts of "
            f"{plan['prompt_tokens']} tokens; on {plan['card']} it {fits}",
            "time": f"a step takes at least {seconds_text(sum(plan['seconds'].values()))} there",
            **({"update": " ".join(plan["notes"])} if plan["notes"] else {}),
        }
    lines |= {"saved in": found["out"], "downloads": "; ".join(downloads) or "nothing from the hub"}
    rows = labelled([(name, Text(text)) for name, text in lines.items()])
    return titled("Nothing was loaded, fetched or written.", "", rows)
