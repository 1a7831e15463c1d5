"""What fits, of the bundled model, which has a few million parameters: cards are scaled down to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import Qwen3Config

from midtune.config import load_config
from midtune.errors import MidtuneError
from midtune.planning.budget import peak
from midtune.planning.search import MOST, planner_of
from midtune.planning.step_size import work_of

CONFIG = load_config(None, {"model.name": "tiny"})
WORK = work_of(CONFIG, 40)


def test_what_is_the_largest_fits_and_more_does_not() -> None:
    planner, _ = planner_of(CONFIG, "1GB")
    assert planner.largest(WORK, "group_size") <= MOST["group_size"]
    largest = planner.largest(WORK, "new_tokens")
    assert WORK.config.training.max_new_tokens < largest < MOST["new_tokens"]
    for size, fits in ((largest * 0.95, True), (largest * 1.05, False)):
        work = WORK.changed({"training.max_new_tokens": int(size)})
        assert (peak(planner.phases("midtune", work))[1] <= planner.card.memory) is fits


def test_three_cards_are_met_in_three_ways() -> None:
    chosen = {}
    for gigabytes in (1.0, 0.72, 0.68):
        planner, _ = planner_of(CONFIG, f"{gigabytes}GB")
        fit = planner.fitting(WORK)
        assert fit is not None
        assert peak(planner.phases("midtune", WORK.changed(fit)))[1] <= gigabytes * 2**30
        chosen[gigabytes] = fit
    assert chosen[1.0] == {}
    assert chosen[0.72].keys() < chosen[0.68].keys() or chosen[0.72] != chosen[0.68]
    assert planner_of(CONFIG, "0.58GB")[0].fitting(WORK) is None


def test_an_embedding_that_is_not_the_head_leaves_the_card_first() -> None:
    config = load_config(None, {"model.name": "Qwen/Qwen3-8B"})
    planner, _ = planner_of(config, "14GB")
    work = work_of(config, 512)
    fit = planner.fitting(work)
    assert fit is not None and fit["model.embeddings"] == "host"
    held = [
        planner.phases("midtune", work.changed({**fit, "model.embeddings": place}))["update"]
        for place in ("device", "host")
    ]
    saved = held[0]["embeddings and head"] - held[1]["embeddings and head"]
    assert saved == 2 * planner.sizes.embedding


def test_an_architecture_that_cannot_run_without_data_is_named() -> None:
    planner, _ = planner_of(CONFIG, "24GB")
    odd = Qwen3Config(num_hidden_layers=12, hidden_act="no such function")
    broken = replace(planner, model=replace(planner.model, config=odd))
    with pytest.raises(MidtuneError, match="memory of `trl-full` is not known: qwen3 cannot run"):
        broken.phases("trl-full", WORK)
