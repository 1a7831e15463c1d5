"""What fits, of the bundled model, which has a few million parameters: cards are scaled down to it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from midtune.bench.flops import rollout_flops, update_flops
from midtune.bench.workload import PLANNED
from midtune.config import load_config, with_settings
from midtune.errors import MidtuneError
from midtune.model.sizes import Sizes
from midtune.planning import search
from midtune.planning.budget import Loaded, peak
from midtune.planning.search import MOST, Planner, planner_of
from midtune.planning.step_size import Work, work_of
from midtune.published import PublishedCard
from midtune.rollout.sampling import SamplingLimits
from midtune.rollout.text import TextSampler

CONFIG = load_config(None, {"model.name": "tiny"})
WORK = work_of(CONFIG, 40)


def test_what_is_the_largest_fits_and_more_does_not() -> None:
    planner = planner_of(CONFIG, "1GB")
    assert planner.largest(WORK, "group_size") <= MOST["group_size"]
    largest = planner.largest(WORK, "new_tokens")
    assert WORK.config.training.max_new_tokens < largest < MOST["new_tokens"]
    for size, fits in ((largest * 0.95, True), (largest * 1.05, False)):
        work = WORK.changed({"training.max_new_tokens": int(size)})
        assert (peak(planner.phases("midtune", work))[1] <= planner.card.memory) is fits


def test_three_cards_are_met_in_three_ways() -> None:
    chosen = {}
    for gigabytes in (1.0, 0.72, 0.68):
        planner = planner_of(CONFIG, f"{gigabytes}GB")
        fit = planner.fitting(WORK)
        assert fit is not None
        assert peak(planner.phases("midtune", WORK.changed(fit)))[1] <= gigabytes * 2**30
        chosen[gigabytes] = fit
    assert chosen[1.0] == {}
    assert chosen[0.72].keys() < chosen[0.68].keys() or chosen[0.72] != chosen[0.68]
    assert planner_of(CONFIG, "0.58GB").fitting(WORK) is None


def test_an_embedding_that_is_not_the_head_leaves_the_card_first() -> None:
    config = load_config(None, {"model.name": "Qwen/Qwen3-8B"})
    planner = planner_of(config, "14GB")
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
    planner = planner_of(CONFIG, "24GB")
    odd = Qwen3Config(num_hidden_layers=12, hidden_act="no such function")
    broken = replace(planner, model=replace(planner.model, config=odd))
    with pytest.raises(MidtuneError, match="memory of `trl-full` is not known: qwen3 cannot run"):
        broken.phases("trl-full", WORK)


SIZES = Sizes(blocks=4, linear=1000, rest=0, widths=0, embedding=500, head=0, outside=0, hidden=1)
STEP = Work(
    load_config(
        None, {"training.prompts_per_step": 2, "training.group_size": 3, "training.max_new_tokens": 5}
    ),
    10,
)


def seconds(
    arm: str, card: PublishedCard, *, unpacked: int = 0, cache: int = 0, **settings: object
) -> dict[str, float]:
    work = STEP.changed({f"training.{key}": value for key, value in settings.items()})
    model = Loaded(Qwen3Config(num_hidden_layers=4), torch.bfloat16, quantized=True, on_card=True)
    planner = Planner(model, SIZES, card, blocks=[2], process=0, device_bytes=1)
    return planner.seconds(arm, work, {"unpacked weights": unpacked, "keys and values": cache})


@pytest.mark.parametrize("arm", PLANNED)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lr", [1e-4, "auto"])
def test_what_has_to_be_computed(arm: str, recompute: bool, lr: object) -> None:
    card = PublishedCard("all memory at once", 1, 10.0, math.inf)
    # A KL term's reference is left out.
    update = update_flops(
        SIZES, STEP.batch(), arm, tail=2, trained=1, recompute=recompute, checked=lr == "auto"
    )
    assert seconds(arm, card, recompute=recompute, beta=0.1, lr=lr) == {
        "sampling": rollout_flops(SIZES, STEP.batch(), arm) / 10,
        "update": update / 10,
    }


def test_what_has_to_be_read() -> None:
    card = PublishedCard("computes at once", 1, math.inf, 1.0)
    packed = 500 + 15 + 0
    ours = seconds("midtune", card, cache=100)
    # Each of five tokens reads all blocks and the head in two bytes, and on average half the cache.
    assert ours["sampling"] == 5 * (4 * packed + 2 * 500 + 50)
    assert seconds("midtune", card, unpacked=1)["sampling"] == 5 * (2 * 4000 + 2 * 500)
    assert seconds("midtune", card, sampled_prompts=1)["sampling"] == 5 * 2 * (4 * packed + 2 * 500)
    assert ours["update"] == 2 * 2 * packed
    assert seconds("midtune", card, micro_batch_tokens=1)["update"] == 2 * 2 * 2 * packed
    # Forward once more, to see how far the step went.
    assert seconds("midtune", card, lr="auto")["update"] == 3 * 2 * packed
    assert seconds("trl-qlora", card)["update"] == 3 * 4 * packed


@pytest.mark.parametrize(("gigabytes", "changes"), [(8.0, False), (0.5, True)])
def test_auto_stays_within_what_is_free(
    load: Any, monkeypatch: pytest.MonkeyPatch, gigabytes: float, changes: bool
) -> None:
    policy = load()
    said: list[str] = []
    monkeypatch.setattr(search, "reachable_bytes", lambda device: round(gigabytes * 2**30))
    rows: Any = [{"prompt": "1+1=", "answer": "2"}]
    task: Any = SimpleNamespace(train=rows, held_out=rows)
    config = with_settings(CONFIG, {"training.fit": "auto", "training.max_new_tokens": 4000})
    sampler = TextSampler(policy, SamplingLimits())
    found = search.fitted(config, sampler, task, [2], 400 * 2**20, said.append)
    assert found.training.fit == "none"
    (line,) = said
    assert line.startswith("to stay within the ")
    assert ("nothing has to change" in line) != changes


def test_auto_changes_nothing_where_nothing_would_do(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    said: list[str] = []
    monkeypatch.setattr(search, "reachable_bytes", lambda device: 0)
    task: Any = SimpleNamespace(train=[{"prompt": "1+1="}], held_out=[])
    config = with_settings(CONFIG, {"training.fit": "auto"})
    found = search.fitted(config, TextSampler(policy, SamplingLimits()), task, [2], 2**40, said.append)
    assert found == with_settings(config, {"training.fit": "none"})
    assert "settings stay as configured: " in said[0] and "whatever is made leaner" in said[0]
