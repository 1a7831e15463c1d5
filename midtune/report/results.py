"""Results of the smaller commands, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from midtune.report.card import form_rows
from midtune.report.formats import (
    blocks_text,
    bytes_text,
    interval_text,
    interval_texts,
    numbers_text,
    percent_text,
    seconds_text,
    sentence,
    share_text,
    with_interval,
)
from midtune.report.tables import labelled, plain_table, titled

STATUS_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
POSITIONS = {"depth": "position: minus depth", "middle": "position: closeness to the middle"}


def score_table(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune eval`: scores with 95% intervals, beside the base model's if known."""
    compared = result["worse"] is not None
    names = ("base", "trained", "gain") if compared else ("score",)
    table = plain_table("task", "", numbers=(*names, "95% interval", "problems"))
    for row in [*result["tasks"], *result["lm_eval"]]:
        for place, (kind, found) in enumerate(row["scores"].items()):
            cells = [_score(found), _interval(found)]
            if compared:
                gain = row["gain"][kind]
                before = _score(row["before"][kind])
                cells = [before, _score(found), f"{gain['value']:+.3f}", _interval(gain, "+")]
            table.add_row(Text("" if place else row["task"]), kind, *cells, str(found["n"]))
        table.add_section()
    patch = f" with trained blocks {numbers_text(result['patch'])}" if result["patch"] else ""
    note = "Nothing was measurably worse than the base; a loss smaller than an interval would not show."
    if result["worse"]:
        worse = ", ".join(result["worse"])
        note = f"Worse than the base: {worse}. Each interval holds 95% alone; of many, some miss by chance."
    notes = [note] if compared else []
    return titled(f"{result['model']}{patch} ({_quantized(result)})", "", table, *notes)


def vote_table(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune vote`: each run alone, their vote, and how far they solve the same problems."""
    runs, vote, gain = result["runs"], result["vote"], result["gain_over_best"]
    sampled = ["sampled"] if any(run["sampled"] for run in runs) else []
    best = max(range(len(runs)), key=lambda index: runs[index]["score"]["score"])

    def row(number: str, name: str, blocks: str, score: Mapping[str, Any], own: str = "") -> list[str]:
        return [number, name, blocks, _score(score), _interval(score), *[own for _ in sampled]]

    rows = [row("", "base model", "", result["base"])]
    for number, run in enumerate(runs, 1):
        own = _score(run["sampled"]) if run["sampled"] else ""
        rows.append(row(str(number), run["run"], numbers_text(run["blocks"]), run["score"], own))
    rows.append(row("", "vote", "", vote))
    overlap = [
        [str(first + 1), *("" if second == first else share_text(share) for second, share in enumerate(line))]
        for first, line in enumerate(result["overlap"])
    ]
    return titled(
        f"{result['model']} ({_quantized(result)}) on {result['task']}, {vote['n']} problems",
        "",
        plain_table("", "run", numbers=("blocks", "score", "95% interval", *sampled), rows=rows),
        "",
        f"The vote's gain over run {best + 1}, the best here, is {gain['value']:+.3f} "
        f"(95% interval {_interval(gain, '+')}). The best is chosen on these same problems, "
        "so on others the gain tends to be larger.",
        f"At least one run solves {result['solved_by_any']:.1%} of the problems, "
        f"all of them solve {result['solved_by_all']:.1%}.",
        "",
        "Of the problems that either of two runs solves, both solve:",
        plain_table(numbers=("run", *(number for number, *_ in overlap)), rows=overlap),
    )


def export_text(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune export`: what was written, and the scores of every form that was."""
    said = f"{result['path']}: {result['tensors']} tensors replaced, {bytes_text(result['bytes'])}."
    if not result["scores"]:
        return Text(said)
    columns = ("before", "after", "gain")
    return titled(said, "", plain_table("form", numbers=columns, rows=form_rows({}, result["forms"])))


def push_text(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune push`: where what went."""
    what = f"{', '.join(result['files'])} ({bytes_text(result['bytes'])})"
    if result["url"] is None:
        return Text(f"{result['folder']} holds what would be sent to {result['repository']}: {what}.")
    return Text(f"{'Public' if result['public'] else 'Private'}: {result['url']}\n{what}.", overflow="fold")


def page_text(result: Mapping[str, Any]) -> RenderableType:
    """Show the file that `midtune report` wrote: `page`."""
    return Text(result["page"], overflow="fold")


def bench_table(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune bench`: seconds and bytes of each arm, and ratios to the first arm's."""
    if "until" in result:
        return _until_table(result)

    def cells(arm: Mapping[str, Any]) -> Iterable[str]:
        yield arm["arm"]
        figures = {phase: seconds_text(arm[phase]["median"]) for phase in ("rollout", "update", "step")}
        figures["memory"] = bytes_text(arm["peak"] - arm["libraries"])
        for name, figure in figures.items():
            ratio = (arm["ratios"] or {}).get(name)
            yield figure if ratio is None or arm is result["arms"][0] else f"{figure} ({ratio:.1f}x)"

    rows = [[*cells(arm)] for arm in result["arms"]]
    rows += [[arm, "-", "-", "-", "failed"] for arm in result["failed"]]
    notes = [
        f"{result['prompts']} prompts x {result['group_size']} completions of {result['new_tokens']} tokens, "
        f"medians of {result['steps']} steps; memory is the peak without the libraries.",
        "Least and greatest seconds are in bench.json. TRL runs with its defaults.",
    ]
    notes += [_profile_text(phase, seconds, result) for phase, seconds in result.get("profile", {}).items()]
    if (operators := result.get("operators")) is not None:
        notes.append(
            f"A decoded token takes {operators['sampler']:.0f} operators a block in midtune, and "
            f"{operators['generate']:.0f} in transformers' generate."
        )
    if any(arm["ratios"] is None for arm in result["arms"]):
        notes.append("An arm without a ratio did not do the same work.")
    notes += map(sentence, result["failed"].values())
    table = plain_table("", numbers=("sampling", "update", "step", "memory"), rows=rows)
    return titled(f"{result['model']}, block {result['block']}", "", table, "", *notes)


def _until_table(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune bench --until`: what each arm learned in the same time, at the best of its learning rates."""
    target, limit = result["target"], result["equal_time"]
    reach = "to the score" if target is None else f"to {percent_text(target)}"
    at = "score then" if limit is None else f"at {seconds_text(limit)}"

    def cells(arm: Mapping[str, Any]) -> Iterable[str]:
        first, last, lr = arm["reached"], arm["points"][-1], arm["lr"]
        yield f"{arm['arm']}, {blocks_text(arm['blocks'])}" if arm["blocks"] else arm["arm"]
        yield lr if isinstance(lr, str) else f"{lr:.2g}"
        yield "not reached" if first is None else seconds_text(first["seconds"])
        yield "-" if first is None else f"{first['samples']:,}"
        for point in (arm["at_equal_time"], last):
            yield with_interval(*interval_texts(point, fractions=True))
        yield seconds_text(last["seconds"])
        yield bytes_text(arm["peak"] - arm["libraries"])

    rows = [[*cells(arm)] for arm in result["arms"]]
    columns = ("rate", reach, "completions", at, "at the end", "which took", "memory")
    notes = [
        f"{result['problems']} held-out problems, the same for all; in brackets 95% intervals. Seconds are those of "
        "training: scoring is not counted. Each arm is shown at the best of its learning rates by this score, on the "
        "model as it trains: where frozen blocks are in 4-bit, on the 4-bit model.",
        "The score to reach is full training's last."
        if result["until"].isdigit() and target is not None
        else "",
        *map(sentence, result["failed"].values()),
    ]
    table = plain_table("", numbers=columns, rows=rows)
    return titled(f"{result['model']} on {result['task']}", "", table, "", *filter(None, notes))


def _profile_text(phase: str, seconds: Mapping[str, float], result: Mapping[str, Any]) -> str:
    """A phase's shares by kind of work, largest first, and its lower bound at the machine's peak."""
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


def compare_table(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune compare`: how far rankings agree, and how far position explains each."""
    rankings, pairs = result["rankings"], result["pairs"]
    top = f"top {pairs[0]['top_k']}"
    names = [
        f"{number}  {ranking['file']}: {ranking['model']} on {ranking['task']}, {ranking['method']}, "
        f"seed {ranking['seed']}, {ranking['ranked']} of {ranking['num_blocks']} blocks"
        for number, ranking in enumerate(rankings, 1)
    ]
    agreements = []
    for pair in pairs:
        rhos = _correlation(pair["spearman"]), _correlation(pair["kendall"])
        shared = f"{pair['overlap']} ({pair['expected']:.1f})"
        p = "<0.001" if pair["p"] < 0.001 else f"{pair['p']:.3f}"
        agreements.append((_pair(pair), str(pair["blocks"]), *rhos, shared, p))
    parts: list[RenderableType] = [
        plain_table("pair", numbers=("blocks", "Spearman", "Kendall", top, "p"), rows=agreements),
        "",
        plain_table(
            numbers=("ranking", "Spearman with minus depth", "with closeness to the middle"),
            rows=[
                (str(number), _correlation(ranking["depth"]), _correlation(ranking["middle"]))
                for number, ranking in enumerate(rankings, 1)
            ],
        ),
        "",
    ]
    for pair in pairs:
        if pair.get("signals"):
            rows = [(POSITIONS.get(key, key), _correlation(rho)) for key, rho in pair["signals"].items()]
            parts += [plain_table(f"signal, pair {_pair(pair)}", numbers=("Spearman",), rows=rows), ""]
    notes = [
        "In brackets: 95% intervals as if blocks were independent. Neighbours are alike, so the intervals "
        "are too narrow and p is too small.",
        f"{sentence(top)}: blocks shared, and what chance gives; p: how often chance gives as many.",
        _compared(pairs),
    ]
    if by_depth := "; ".join(_pair(pair) for pair in pairs if pair["matched"] == "depth"):
        notes.append(f"Matched by relative depth, the ranking with more blocks interpolated: {by_depth}.")
    return Group(*map(Text, names), "", *parts, *map(Text, notes))


def _pair(pair: Mapping[str, Any]) -> str:
    return f"{pair['first'] + 1}, {pair['second'] + 1}"


def _correlation(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return "-"
    return with_interval(f"{found['value']:.2f}", interval_text(found, ".2f"))


def _compared(pairs: Sequence[Mapping[str, Any]]) -> str:
    by_share = [_pair(pair) for pair in pairs if pair["compared"] == "contribution"]
    if len(by_share) in (0, len(pairs)):
        return f"Compared: {'C(k)' if by_share else 'scores'}."
    return f"Compared: C(k) for {'; '.join(by_share)}, scores for the others."


def tasks_text(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune tasks`: names, one a line; a problem and what answers score; or the findings of a check."""
    if "tasks" in result:
        return Text("\n".join(result["tasks"]))
    if "checked" in result:
        verdict = "can be read, but its reward is in doubt" if result["doubts"] else "can be trained on"
        findings = "\n".join(f"  {finding}" for finding in [*result["doubts"], *result["findings"]])
        return titled(f"{result['checked']} {verdict}", findings)
    parts: dict[str, str] = {"prompt": result["prompt"]}
    if result["answer"]:
        parts["answer"] = result["answer"]
    for name in ("right", "wrong"):
        if name in result:
            title = f"a {name} answer, which `{result['reward']}` gives {result[name]['score']:g}"
            parts[title] = result[name]["completion"]
    shown = Text(result["task"], style="bold")
    for key, value in result["arguments"].items():
        shown.append(f"\n  {key}={value}", style="not bold")
    sections = [Text(f"\n{title}\n", style="bold").append(body, "not bold") for title, body in parts.items()]
    return Group(shown, *sections)


@dataclass(frozen=True)
class Answers:
    """Show an answer of `midtune try`: on a terminal base and trained in columns, elsewhere below each other."""

    result: Mapping[str, Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        arms = [arm for arm in ("base", "trained") if arm in self.result]
        scores = [self.result[arm]["score"] for arm in arms]
        titles = [
            f"{arm}{'' if score is None else f' ({score:g})'}"
            for arm, score in zip(arms, scores, strict=True)
        ]
        texts = [Text(self.result[arm]["completion"].strip()) for arm in arms]
        answer = "" if self.result["answer"] is None else f"  [answer: {self.result['answer']}]"
        yield Text("> ", "bold").append(self.result["prompt"] + answer, "not bold")
        if options.is_terminal:
            table = Table(
                *(Column(title, ratio=1, overflow="fold") for title in titles), box=box.SIMPLE, expand=True
            )
            table.add_row(*texts)
            yield table
        else:
            yield Group(
                *(Text(f"{title}: ").append(text) for title, text in zip(titles, texts, strict=True)), ""
            )


def init_text(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune init`: the recipe that was written, and how to go on."""
    fits = {None: "whether it fits is not known", True: "it fits as it is", False: "made leaner to fit"}
    changes = result["changes"]
    return Text(
        f"{result['file']}: {result['model']} on {result['task']}, {result['problems']} problems; on {result['card']}, "
        f"{fits[None if changes is None else not changes]}.\n"
        f"See what it would do with `midtune train --recipe {result['file']} --dry-run`."
    )


def recipes_text(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune recipes`: each recipe with what was measured; the text of one; or the files that were copied."""
    if "text" in result:
        return Text(result["text"].rstrip())
    if "copied" in result:
        return Text("\n".join(result["copied"]), overflow="fold")
    shown = Text()
    for recipe in result["recipes"]:
        shown.append(recipe["name"], "bold").append(f"\n  {recipe['about']}.\n")
        shown.append(f"  {recipe['model']} on {recipe['task']}\n  {recipe['measured'] or 'not run yet'}\n")
    return shown.append(
        "\nStart with `midtune train --recipe NAME`, sweeps with `midtune probe --recipe NAME`."
    )


def doctor_table(result: Mapping[str, Any]) -> RenderableType:
    """Show `midtune doctor`: a line per check, with what to do below it if needed."""
    rows = []
    for check in result["checks"]:
        status = Text(check["status"], style=STATUS_STYLES[check["status"]])
        advice = f"\n-> {check['fix']}" if check["fix"] else ""
        rows.append((status, Text(check["name"]), Text(check["found"] + advice)))
    counts = {"problem": result["problems"], "warning": result["warnings"]}
    found = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
    ready = "Not ready" if result["problems"] else "Ready"
    return Group(labelled(rows, labels=2), "", Text(f"{ready}{': ' * bool(found)}{' and '.join(found)}."))


def _quantized(result: Mapping[str, Any]) -> str:
    return "unquantized" if result["quantize"] == "none" else str(result["quantize"])


def _score(found: Mapping[str, Any]) -> str:
    return f"{found['score']:.3f}"


def _interval(found: Mapping[str, Any], sign: str = "") -> str:
    return interval_text(found, f"{sign}.3f") or "unknown"
