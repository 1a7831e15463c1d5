"""`midtune compare`: does a ranking of blocks carry over to another task, algorithm, seed or model?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.probe.agreement import (
    Correlation,
    at_relative_depths,
    depth_correlation,
    kendall,
    middle_correlation,
    spearman,
    top_overlap,
)
from midtune.probe.selection import read_probe
from midtune.report.depth import depth_of, points, value_name
from midtune.report.formats import finite
from midtune.report.plots import rankings_curve
from midtune.report.terminal import Terminal
from midtune.whole import require_writable

FEWEST_BLOCKS = 3
PICTURES = (".svg", ".png", ".pdf")


def run(files: Sequence[Path], *, top_k: int, out: Path | None, terminal: Terminal) -> dict[str, Any]:
    """Compare every two of the rankings in `files`, and each with position alone; draw them if `out` is given.

    Only blocks that both rankings have are compared: by contribution if all of them have one, else by score. If the
    models differ in depth, the deeper model's ranking is interpolated at the relative depths of the other's blocks.

    Returns:
        `rankings`, each with its Spearman correlation with minus depth (`depth`) and with closeness to the middle
        (`middle`). `pairs`: `first` and `second` index the rankings from 0; if one of the two has `signals`, the
        Spearman correlation of each signal, and of position, with the other's values.

    Raises InputError if a file is no probe.json, two rankings share too few blocks, or `out` cannot be drawn.
    """
    if len(files) < 2:
        raise InputError(
            f"{len(files)} ranking was given, but a comparison takes two or more; "
            "name the probe.json or the run folder of each."
        )
    if out is not None:
        if out.suffix.lower() not in PICTURES:
            raise InputError(
                f"{out} was to be a picture, but its name ends in none of {', '.join(PICTURES)}; "
                "choose such a name with --out."
            )
        require_writable(out)
    probes = [read_probe(file) for file in files]
    for file, probe in zip(files, probes, strict=True):
        if probe.get("num_blocks") is None:
            terminal.message(
                f"{file} does not say how many blocks the model has; {depth_of(probe)} are assumed, "
                "up to the deepest one ranked"
            )
    pairs = []
    for first, second in combinations(range(len(files)), 2):
        names = f"{files[first]} and {files[second]}"
        pairs.append({"first": first, "second": second, **_pair(probes[first], probes[second], top_k, names)})
    rankings = [_ranking(file, probe) for file, probe in zip(files, probes, strict=True)]
    if out is not None:
        labels = [
            f"{number}: {ranking['model']} on {ranking['task']}, {ranking['method']}, seed {ranking['seed']}"
            for number, ranking in enumerate(rankings, 1)
        ]
        rankings_curve(dict(zip(labels, probes, strict=True)), out)
        terminal.message(f"the rankings are drawn in {out}")
    return {"rankings": rankings, "pairs": pairs}


def _ranking(file: Path, probe: Mapping[str, Any]) -> dict[str, Any]:
    values, num_blocks = {point.block: point.value for point in points(probe)}, depth_of(probe)
    return {
        "file": str(file),
        **{key: probe.get(key) for key in ("model", "revision", "task", "method", "seed")},
        "num_blocks": num_blocks,
        "ranked": len(values),
        "compared": "contribution" if value_name(probe) == "C(k)" else "score",
        "depth": _figures(depth_correlation(values)),
        "middle": _figures(middle_correlation(values, num_blocks)),
    }


def _pair(first: Mapping[str, Any], second: Mapping[str, Any], top_k: int, names: str) -> dict[str, Any]:
    """One entry of `pairs`; `names` stands for both files in errors."""
    by_key = {key: _in_common(first, second, key) for key in ("contribution", "score")}
    compared, common = max(by_key.items(), key=lambda item: len(item[1]))
    if len(common) < FEWEST_BLOCKS:
        raise InputError(
            f"{names} have {len(common)} ranked blocks in common, but a comparison needs {FEWEST_BLOCKS}; "
            "rank more blocks with `midtune probe`."
        )
    if not 1 <= top_k <= len(common):
        raise InputError(
            f"the best {top_k} blocks were to be compared, but {names} have {len(common)} ranked blocks in "
            f"common; ask for 1 to {len(common)} with --top-k."
        )
    one, other = [value for value, _ in common], [value for _, value in common]
    return {
        "matched": "block" if depth_of(first) == depth_of(second) else "depth",
        "compared": compared,
        "blocks": len(common),
        "spearman": _figures(spearman(one, other)),
        "kendall": _figures(kendall(one, other)),
        "top_k": top_k,
        **top_overlap(one, other, top_k),
        "signals": _signals(first, second) or _signals(second, first),
    }


def _signals(cheap: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """How well each signal of one ranking, and position, predict the values of another of the same depth."""
    known = {row["block"]: row["signals"] for row in cheap["blocks"] if row.get("signals")}
    values = {point.block: point.value for point in points(other) if point.block in known}
    if not values or depth_of(cheap) != depth_of(other):
        return None
    names = next(iter(known.values()))
    found = {name: spearman([known[block][name] for block in values], [*values.values()]) for name in names}
    found |= {"depth": depth_correlation(values), "middle": middle_correlation(values, depth_of(other))}
    return {name: _figures(correlation) for name, correlation in found.items()}


def _in_common(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    fewer = min(depth_of(first), depth_of(second))
    one, other = (at_relative_depths(_values(each, key), depth_of(each), fewer) for each in (first, second))
    return [(one[block], other[block]) for block in sorted(one.keys() & other.keys())]


def _values(probe: Mapping[str, Any], key: str) -> dict[int, float]:
    if probe["method"] == "race" and key == "score":
        # A race trains its blocks for different numbers of steps, so scores do not compare.
        return {row["block"]: -float(row["rank"]) for row in probe["blocks"]}
    return {row["block"]: value for row in probe["blocks"] if (value := finite(row.get(key))) is not None}


def _figures(correlation: Correlation | None) -> dict[str, float | None] | None:
    return None if correlation is None else asdict(correlation)
