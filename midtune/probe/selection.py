"""Which blocks to train: named, ranked, or the geometric middle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from midtune.errors import InputError, explained
from midtune.runs import RunFolder, unsealed

_RANGE = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")


def parse_layers(text: str, num_blocks: int, top_k: int = 1) -> list[int]:
    """Parse `14`, `10-12`, `3,7`, `0-2,9` or `middle` into sorted block numbers; `top_k` is the width of `middle`.

    Raises:
        InputError: unreadable text, a range that runs backwards, or a block the model does not have.
    """
    if text.strip().lower() == "middle":
        return middle(num_blocks, top_k)
    found: set[int] = set()
    for part in text.split(","):
        if (match := _RANGE.fullmatch(part.strip())) is None:
            raise InputError(
                f"layers `{text}` cannot be read; write block numbers such as `14`, `10-12` or `3,7`, "
                "or `middle`."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"layers `{part.strip()}` run backwards; write `{last}-{first}`.")
        if last >= num_blocks:
            raise InputError(
                f"layer {max(first, num_blocks) if match[2] else last} was asked for, but the model has "
                f"{num_blocks} blocks, 0 to {num_blocks - 1}; choose among those."
            )
        found.update(range(first, last + 1))
    return sorted(found)


def middle(num_blocks: int, k: int) -> list[int]:
    """The k blocks in the geometric middle: the window [⌊L/2 − k/2⌋, ⌊L/2 + k/2⌋) of arXiv 2607.01232.

    Raises:
        InputError: the model has fewer than k blocks.
    """
    _check_top_k(num_blocks, k)
    return list(range((num_blocks - k) // 2, (num_blocks + k) // 2))


def from_the_middle(blocks: Iterable[int], num_blocks: int) -> list[int]:
    """Sort blocks by closeness to the middle; ties go to the lower block, as in `middle`."""
    return sorted(blocks, key=lambda block: (abs(block - (num_blocks - 1) / 2), block))


def best_first(values: Mapping[int, float]) -> list[int]:
    """Sort blocks by value, highest first; ties go to the deeper block, whose updates are cheaper."""
    return sorted(values, key=lambda block: (-values[block], -block))


def best(ranking: Sequence[int], num_blocks: int, top_k: int) -> list[int]:
    """The first `top_k` blocks of a ranking, in order of depth.

    Raises:
        InputError: the ranking has fewer, or ranks a block that the model does not have.
    """
    _check_top_k(num_blocks, top_k)
    if beyond := [block for block in ranking if not 0 <= block < num_blocks]:
        raise InputError(
            f"the ranking has block {beyond[0]}, but the model has {num_blocks} blocks, "
            f"0 to {num_blocks - 1}; use a probe of this model."
        )
    if top_k > len(ranking):
        raise InputError(
            f"{top_k} blocks were asked for, but only {len(ranking)} were ranked; "
            "ask for fewer with --top-k, or rank more."
        )
    return sorted(ranking[:top_k])


def read_probe(path: Path) -> dict[str, Any]:
    """Read a probe.json, given the file or its run folder.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    file = RunFolder(path).probe if path.is_dir() else path
    with explained(f"{file} is not a probe.json that can be read; make one with `midtune probe`."):
        probe = unsealed(file.read_bytes())
        probe["method"], probe["blocks"][0]
        [(row["block"], row["score"], row["rank"]) for row in probe["blocks"]]
    return probe


def ranking_of(probe: Mapping[str, Any]) -> list[int]:
    """Block numbers of a probe.json, best first."""
    return [row["block"] for row in sorted(probe["blocks"], key=lambda row: row["rank"])]


def matching_probe(probe: Mapping[str, Any], model: str, fingerprint: str, revision: str | None) -> bool:
    """Whether a probe.json is about this model, revision and task fingerprint."""
    about = probe.get("model"), probe.get("task_fingerprint"), probe.get("revision")
    return about == (model, fingerprint, revision)


def _check_top_k(num_blocks: int, top_k: int) -> None:
    if not 1 <= top_k <= num_blocks:
        raise InputError(
            f"{top_k} blocks were asked for, but the model has {num_blocks}; "
            f"ask for 1 to {num_blocks} with --top-k."
        )
