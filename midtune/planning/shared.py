"""What it takes to share a step among several cards: bytes sent and seconds, by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midtune.errors import InputError
from midtune.planning.search import Planner
from midtune.planning.step_size import Work
from midtune.published import LINKS

# Blocks that FSDP2 holds whole at a time: the one at work and the next.
WHOLE_BLOCKS = 2
# Share of a step from which on sending counts as holding it up.
HOLDS_UP = 0.1


def one_share(work: Work, devices: int) -> Work:
    """The part of a step that one of the cards does; raises InputError if its prompts cannot be shared evenly."""
    prompts = work.config.training.prompts_per_step
    if prompts % devices:
        raise InputError(
            f"{prompts} prompts a step cannot be shared evenly among {devices} cards; choose a multiple of {devices} "
            "with --prompts-per-step, or another number of cards."
        )
    return work.changed({"training.prompts_per_step": prompts // devices})


def between_cards(planner: Planner, work: Work, arm: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """What each card sends in a step, where every card has its share `work`, planned as `arm`.

    A ring of N cards averages B bytes by sending 2·(N − 1)/N·B from each.

    Returns:
        `gradient` and `sent` bytes, and `full_sent`, those of training all parameters; `links`: each with its `name`,
        the `seconds` it takes to send and their `share` of the arm's least seconds. At `least_speed`, in bytes a
        second, sending takes `HOLDS_UP` of them. `sharded`, an estimate: bytes `saved` on each card if FSDP2 shared
        out the frozen blocks, and those each then receives in a step, `sent`, since every sampled token passes all.
    """
    others = (devices - 1) / devices
    gradient = arm["phases"]["sampling"]["trained blocks, fp32"]
    sent, step = 2 * others * gradient, sum(arm["seconds"].values())
    sizes, batch = planner.sizes, work.batch()
    frozen = arm["phases"]["sampling"]["frozen blocks"]
    passes = batch.new_tokens * -(-batch.prompts // work.sampled_prompts)
    return {
        "devices": devices,
        "prompts": batch.prompts,
        "gradient": gradient,
        "sent": round(sent),
        "full_sent": round(2 * others * 4 * sizes.total),
        "links": [
            {"name": name, "seconds": sent / speed, "share": sent / speed / step}
            for name, speed in LINKS.items()
        ],
        "least_speed": sent / (HOLDS_UP * step),
        "sharded": {
            "saved": round(others * frozen * (1 - WHOLE_BLOCKS / sizes.blocks)),
            "sent": round(others * frozen * passes),
        },
    }
