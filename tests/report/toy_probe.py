"""A probe.json to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def toy_probe(
    scores: Sequence[float | None], *, half_width: float | None = None, full: float | None = None, **more: Any
) -> dict[str, Any]:
    """A ranking of all blocks of a model, one score each.

    Args:
        scores: per block from 0 on.
        half_width: half the width of every interval; None: there are none.
        full: the gain of full training, to which the contributions are relative; None: not measured.
        more: further keys, or other values for those here.
    """

    def row(block: int, score: float | None) -> dict[str, Any]:
        bounds = (
            [None, None] if half_width is None or score is None else [score - half_width, score + half_width]
        )
        shares = [None if full is None or value is None else value / full for value in (score, *bounds)]
        return {
            "block": block,
            **dict(zip(("score", "low", "high"), (score, *bounds), strict=True)),
            **dict(zip(("contribution", "contribution_low", "contribution_high"), shares, strict=True)),
            "step_cost": 2.0 - block / len(scores),
            "rank": ranks[block],
        }

    order = sorted(range(len(scores)), key=lambda block: -(scores[block] or 0))
    ranks = {block: rank for rank, block in enumerate(order, 1)}
    middle = (len(scores) - 1) // 2
    return {
        "schema": 1,
        "model": "toy",
        "revision": None,
        "num_blocks": len(scores),
        "task": "sums",
        "task_fingerprint": "f",
        "method": "sweep",
        "seed": 0,
        "cost_seconds": 60.0,
        "blocks": [row(block, score) for block, score in enumerate(scores)],
        "full": None if full is None else {"score": full, "low": full, "high": full, "step_cost": 3.0},
        "selected": order[:1],
        "depth_baseline": {"block": middle, "score": scores[middle]},
        **more,
    }
