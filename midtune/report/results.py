"""The results of the smaller commands as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midtune.report.tables import bytes_text, plain_table, seconds_text


def score_table(result: Mapping[str, Any]) -> RenderableType:
    """Scores with 95% intervals, beside those of the base where there are any.

    Args:
        result: what `midtune eval` found: `model`, `patch`, `quantize`, `tasks`, `lm_eval`, `worse`.
    """
    blocks = result["patch"]
    patch = f" with trained blocks {', '.join(map(str, blocks))}" if blocks else ""
    compared = result["worse"] is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("", no_wrap=True)
    if compared:
        for name in ("base", "trained", "gain", "95% interval", "problems"):
            table.add_column(name, justify="right", no_wrap=True)
    else:
        for name in ("score", "95% interval", "problems"):
            table.add_column(name, justify="right", no_wrap=True)
    for row in [*result["tasks"], *result["lm_eval"]]:
        for place, (kind, found) in enumerate(row["scores"].items()):
            score = f"{found['score']:.3f}"
            cells = [score, _interval(found)]
            if compared:
                gain = row["gain"][kind]
                was = f"{row['before'][kind]['score']:.3f}"
                cells = [was, score, f"{gain['value']:+.3f}", _interval(gain, "+")]
            table.add_row(Text("" if place else row["task"]), kind, *cells, str(found["n"]))
        table.add_section()
    heading = Text(f"{result['model']}{patch} ({_held(result)})", style="bold")
    return Group(heading, table, *([Text(_worse_text(result["worse"]))] if compared else []))


def _worse_text(worse: Sequence[str]) -> str:
    if worse:
        return f"Worse than the base: {', '.join(worse)}. Each interval holds 95% alone; of many, some miss by chance."
    return "Nothing was measurably worse than the base; a loss smaller than an interval would not show."


def vote_table(result: Mapping[str, Any]) -> RenderableType:
    """Each run alone, their vote, and how far they solve the same problems.

    Args:
        result: what `midtune vote` found.
    """
    runs, vote = result["runs"], result["vote"]
    sampled = any(run["sampled"] for run in runs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    for name in ("blocks", "score", "95% interval", *(["sampled"] if sampled else [])):
        table.add_column(name, justify="right", no_wrap=True)

    def add(number: str, name: str, blocks: str, score: Mapping[str, Any], own: str = "") -> None:
        # As Text, so that brackets in a path are no markup.
        table.add_row(number, Text(name), blocks, f"{score['score']:.3f}", _interval(score), *[own] * sampled)

    add("", "base model", "", result["base"])
    for number, run in enumerate(runs, start=1):
        own = f"{run['sampled']['score']:.3f}" if run["sampled"] else ""
        add(str(number), run["run"], ", ".join(map(str, run["blocks"])), run["score"], own)
    table.add_section()
    add("", "vote", "", vote)

    best = max(range(len(runs)), key=lambda index: runs[index]["score"]["score"])
    gain = result["gain_over_best"]
    heading = f"{result['model']} ({_held(result)}) on {result['task']}, {vote['n']} problems"
    return Group(
        Text(heading, style="bold"),
        table,
        Text(
            f"The vote's gain over run {best + 1}, the best here, is {gain['value']:+.3f} "
            f"(95% interval {_interval(gain, '+')}). The best is chosen on these same problems, "
            "so on others the gain tends to be larger."
        ),
        Text(
            f"At least one run solves {result['solved_by_any']:.1%} of the problems, "
            f"all of them solve {result['solved_by_all']:.1%}."
        ),
        Text("\nOf the problems that either of two runs solves, both solve:"),
        _overlap_table(result["overlap"]),
    )


def _overlap_table(overlap: Sequence[Sequence[float | None]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", *map(str, range(1, len(overlap) + 1))):
        table.add_column(name, justify="right", no_wrap=True)
    for row, shares in enumerate(overlap):
        cells = ["-" if share is None else f"{share:.0%}" for share in shares]
        cells[row] = ""
        table.add_row(str(row + 1), *cells)
    return table


def merge_text(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune merge` wrote: `folder`, `tensors`, `bytes`."""
    return Text(f"{result['folder']}: {result['tensors']} tensors replaced, {bytes_text(result['bytes'])}.")


def page_text(result: Mapping[str, Any]) -> RenderableType:
    """The file that `midtune report` wrote: `page`."""
    return Text(result["page"], overflow="fold")


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


def compare_table(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune compare` found: how far rankings agree, and how far position explains each."""
    names = [
        f"{number}  {ranking['file']}: {ranking['model']} on {ranking['task']}, {ranking['method']}, "
        f"seed {ranking['seed']}, {ranking['ranked']} of {ranking['num_blocks']} blocks"
        for number, ranking in enumerate(result["rankings"], 1)
    ]
    pairs = result["pairs"]
    agreement = plain_table()
    agreement.add_column("pair", no_wrap=True)
    for name in ("blocks", "Spearman", "Kendall", f"top {pairs[0]['top_k']}", "p"):
        agreement.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        agreement.add_row(
            _pair(pair),
            str(pair["blocks"]),
            _correlation(pair["spearman"]),
            _correlation(pair["kendall"]),
            f"{pair['overlap']} ({pair['expected']:.1f})",
            "<0.001" if pair["p"] < 0.001 else f"{pair['p']:.3f}",
        )
    position = plain_table()
    for name in ("ranking", "Spearman with minus depth", "with closeness to the middle"):
        position.add_column(name, justify="right", no_wrap=True)
    for number, ranking in enumerate(result["rankings"], 1):
        position.add_row(str(number), _correlation(ranking["depth"]), _correlation(ranking["middle"]))
    notes = [
        "In brackets: 95% intervals as if blocks were independent. Neighbours are alike, so the intervals "
        "are too narrow and p is too small.",
        f"Top {pairs[0]['top_k']}: blocks shared, and what chance gives; p: how often chance gives as many.",
        _compared(pairs),
    ]
    if by_depth := [_pair(pair) for pair in pairs if pair["matched"] == "depth"]:
        notes.append(
            f"Matched by relative depth, the ranking with more blocks interpolated: {'; '.join(by_depth)}."
        )
    parts: list[RenderableType] = [agreement, "", position, ""]
    for pair in pairs:
        if pair.get("signals"):
            signals = plain_table()
            signals.add_column(f"signal, pair {_pair(pair)}", no_wrap=True)
            signals.add_column("Spearman", justify="right", no_wrap=True)
            for name, found in pair["signals"].items():
                free = {"depth": "position: minus depth", "middle": "position: closeness to the middle"}
                signals.add_row(free.get(name, name), _correlation(found))
            parts += [signals, ""]
    return Group(*map(Text, names), "", *parts, *map(Text, notes))


def _pair(pair: Mapping[str, Any]) -> str:
    return f"{pair['first'] + 1}, {pair['second'] + 1}"


def _correlation(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return "-"
    bounds = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['value']:.2f}{bounds}"


def _compared(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Which values the pairs were compared by."""
    by_share = [_pair(pair) for pair in pairs if pair["compared"] == "contribution"]
    if len(by_share) in (0, len(pairs)):
        return f"Compared: {'C(k)' if by_share else 'scores'}."
    return f"Compared: C(k) for {'; '.join(by_share)}, scores for the others."


def tasks_text(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune tasks` found: names, one a line; a problem and what answers score; or the findings of a check."""
    if "tasks" in result:
        return Text("\n".join(result["tasks"]))
    if "checked" in result:
        verdict = "can be read, but its reward is in doubt" if result["doubts"] else "can be trained on"
        findings = "\n".join(f"  {finding}" for finding in [*result["doubts"], *result["findings"]])
        return Group(Text(f"{result['checked']} {verdict}", style="bold"), Text(findings))
    arguments = [f"\n  {key}={value}" for key, value in result["arguments"].items()]
    parts: dict[str, str] = {"prompt": result["prompt"]}
    if result["answer"]:
        parts["answer"] = result["answer"]
    for name in ("right", "wrong"):
        if name in result:
            title = f"a {name} answer, which `{result['reward']}` gives {result[name]['score']:g}"
            parts[title] = result[name]["completion"]
    shown = [
        Text(text, style=style)
        for title, body in parts.items()
        for text, style in ((f"\n{title}", "bold"), (body, ""))
    ]
    return Group(Text(result["task"], style="bold").append("".join(arguments), style="not bold"), *shown)


def doctor_table(result: Mapping[str, Any]) -> RenderableType:
    """What `midtune doctor` found: a line for each check, and below it what to do where there is something."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in result["checks"]:
        text = Text(check["found"])
        if check["fix"]:
            text.append(f"\n-> {check['fix']}")
        table.add_row(Text(check["status"], style=styles[check["status"]]), check["name"], text)
    return Group(table, "", Text(_verdict(result["problems"], result["warnings"])))


def _verdict(problems: int, warnings: int) -> str:
    found = [
        f"{count} {what}{'s' * (count > 1)}"
        for count, what in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    ready = "Not ready" if problems else "Ready"
    return f"{ready}: {' and '.join(found)}." if found else f"{ready}."


def _held(result: Mapping[str, Any]) -> str:
    return "unquantized" if result["quantize"] == "none" else str(result["quantize"])


def _interval(found: Mapping[str, Any], sign: str = "") -> str:
    low, high = found["low"], found["high"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unknown"
    return f"{low:{sign}.3f} to {high:{sign}.3f}"
