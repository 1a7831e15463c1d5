"""What cards send to share a step, worked out by hand."""

from __future__ import annotations

import math

import pytest

from midtune.config import load_config
from midtune.planning.search import planner_of
from midtune.planning.shared import WHOLE_BLOCKS, between_cards
from midtune.planning.step_size import work_of

CONFIG = load_config(None, {"model.name": "tiny", "training.prompts_per_step": 2})
ARM = {
    "phases": {"sampling": {"trained blocks, fp32": 4_000_000, "frozen blocks": 24_000_000}},
    "seconds": {"sampling": 0.002, "update": 0.001},
}


def test_four_cards_by_hand() -> None:
    work = work_of(CONFIG, 40).changed({"training.max_new_tokens": 10})
    planner = planner_of(CONFIG, "24GB")
    found = between_cards(planner, work, ARM, 4)
    # 2 · 3/4 of 4 MB.
    assert (found["prompts"], found["gradient"], found["sent"]) == (2, 4_000_000, 6_000_000)
    assert found["full_sent"] == round(1.5 * 4 * planner.sizes.total)
    ethernet = found["links"][-1]
    assert ethernet["name"] == "10-gigabit Ethernet"
    assert ethernet["seconds"] == pytest.approx(6e6 / 1.25e9)
    assert ethernet["share"] == pytest.approx(6e6 / 1.25e9 / 0.003)
    assert found["least_speed"] == pytest.approx(6e6 / 0.0003)
    # Three quarters of 24 MB, less two whole blocks; each of ten tokens needs three quarters.
    kept = WHOLE_BLOCKS / planner.sizes.blocks
    assert found["sharded"] == {"saved": round(18e6 * (1 - kept)), "sent": 180_000_000}


def test_prompts_sampled_in_parts_pass_all_blocks_as_often() -> None:
    work = work_of(CONFIG, 40).changed({"training.max_new_tokens": 10, "training.sampled_prompts": 1})
    found = between_cards(planner_of(CONFIG, "24GB"), work, ARM, 4)
    assert found["sharded"]["sent"] == 2 * 180_000_000


def test_a_card_whose_speed_is_not_known() -> None:
    found = between_cards(
        planner_of(CONFIG, "24GB"),
        work_of(CONFIG, 40),
        {**ARM, "seconds": {"sampling": math.nan, "update": math.nan}},
        2,
    )
    assert all(math.isnan(link["share"]) and link["seconds"] > 0 for link in found["links"])
