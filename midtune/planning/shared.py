"""What cards send each other to share a step: bytes and seconds, by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midtune.planning.search import Planner
from midtune.planning.step_size import Work
from midtune.published import LINKS

# Blocks that FSDP2 holds whole at a time: the one at work and the next.
WHOLE_BLOCKS = 2
# Share of a step from which on sending counts as holding it up.
HOLDS_UP = 0.1


def between_cards(planner: Planner, work: Work, arm: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """What each of `devices` cards sends in a step, of which it does the part `work`, planned as `arm`.

    A ring of N cards averages B bytes by sending 2·(N − 1)/N·B from each.

    Returns:
        `gradient` and `sent` bytes, and `full_sent`, those of training all parameters; `links`: each with its `name`,
        the `seconds` it takes to send and their `share` of the arm's least seconds. At `least_speed`, in bytes a
        second, sending takes `HOLDS_UP` of them. `sharded`, an estimate: bytes `saved` on each card if FSDP2 shared
        out the frozen blocks, and those each then receives in a step, `sent`, since every sampled token passes all.
    """
    others, held = (devices - 1) / devices, arm["phases"]["sampling"]
    gradient, frozen = held["trained blocks, fp32"], others * held["frozen blocks"]
    sent, step = 2 * others * gradient, sum(arm["seconds"].values())
    batch, blocks = work.batch(), planner.sizes.blocks
    seconds = {name: sent / speed for name, speed in LINKS.items()}
    passes = batch.new_tokens * -(-batch.prompts // work.sampled_prompts)
    return {
        "devices": devices,
        "prompts": batch.prompts,
        "gradient": gradient,
        "sent": round(sent),
        "full_sent": round(2 * others * 4 * planner.sizes.total),
        "links": [{"name": name, "seconds": s, "share": s / step} for name, s in seconds.items()],
        "least_speed": sent / (HOLDS_UP * step),
        "sharded": {"saved": round(frozen * (1 - WHOLE_BLOCKS / blocks)), "sent": round(frozen * passes)},
    }
