from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from midtune.bench.flops import Batch, update_flops
from midtune.config import RunConfig, load_config
from midtune.planning.estimate import estimated_phases, mean_step, one_more_block
from midtune.planning.search import planner_for
from midtune.rollout.sampling import SamplingLimits
from midtune.rollout.text import TextSampler
from tests.planning.toy_sizes import SIZES

BATCH = Batch(prompts=2, group_size=4, prompt_tokens=10.5, new_tokens=5.25)
MEASURED = {"rollout": 2.0, "reward": 0.5, "update": 1.0}


def phases(arm: str, updated_share: float = 1.0, **settings: Any) -> dict[str, float]:
    config: RunConfig = load_config(None, {f"training.{key}": value for key, value in settings.items()})
    return estimated_phases(arm, SIZES, BATCH, config, [6, 7], MEASURED, updated_share)


@pytest.mark.parametrize("arm", ["trl-full", "trl-qlora"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_measured_update_is_scaled(arm: str, recompute: bool, beta: float) -> None:
    def flops(name: str) -> float:
        asked = {"tail": 4, "trained": 2, "recompute": recompute, "reference": beta > 0}
        return update_flops(SIZES, BATCH, name, **asked)  # type: ignore[arg-type]

    found = phases(arm, beta=beta, recompute=recompute, lr=1e-4)
    assert found == {**MEASURED, "update": pytest.approx(flops(arm) / flops("midtune"))}


def test_the_check_of_a_trust_region_is_part_of_the_measured_update() -> None:
    asked = {"tail": 4, "trained": 2}
    full, ours = (update_flops(SIZES, BATCH, arm, **asked, checked=True) for arm in ("trl-full", "midtune"))  # type: ignore[arg-type]
    assert phases("trl-full", beta=0.0, lr="auto")["update"] == pytest.approx(full / ours)


def test_skipped_groups_made_the_measured_update_shorter() -> None:
    whole = phases("trl-full")["update"]
    assert phases("trl-full", 0.5)["update"] == pytest.approx(2 * whole)
    # At least one of two groups was updated.
    assert phases("trl-full", 0.0)["update"] == pytest.approx(2 * whole)


@pytest.mark.parametrize(("trained", "other"), [([2], 1), ([0, 1], 2)])
def test_one_more_block_costs_what_a_plan_of_both_differs_by(
    load: Callable[..., Any], trained: list[int], other: int
) -> None:
    policy = load("qwen3")
    for block in trained:
        policy.thaw(block)
    sampler, task = TextSampler(policy, SamplingLimits()), SimpleNamespace(train=[{"prompt": "1+1="}])
    steps = [{"completion_length": 4.0}, {"completion_length": 6.0}]
    config = load_config(None, {"training.beta": 0, "training.lr": 1e-4})
    asked: Any = (config, sampler, task, steps)
    found = one_more_block(*asked, measured=MEASURED)
    assert found is not None
    batch, work = mean_step(*asked)
    assert (batch.new_tokens, work.config.training.max_new_tokens) == (5.0, 5)
    wider = sorted([*trained, other])
    flops, bytes_ = [], []
    for blocks in (trained, wider):
        planner = planner_for(policy, blocks, 0)
        tail = {"tail": planner.sizes.blocks - blocks[0], "trained": len(blocks)}
        flops.append(update_flops(planner.sizes, batch, "midtune", **tail))
        bytes_.append(max(sum(parts.values()) for parts in planner.phases("midtune", work).values()))
    assert found == {
        "block": other,
        "step": pytest.approx(MEASURED["update"] * (flops[1] / flops[0] - 1)),
        "peak": bytes_[1] - bytes_[0],
    }
    assert found["step"] > 0 and found["peak"] > 0


def test_there_is_no_further_block_where_all_are_trained(load: Callable[..., Any]) -> None:
    policy = load("qwen3")
    for block in range(policy.num_blocks):
        policy.thaw(block)
    sampler: Any = TextSampler(policy, SamplingLimits())
    assert one_more_block(load_config(None, {}), sampler, None, [], measured=MEASURED) is None  # type: ignore[arg-type]


def test_the_price_of_a_further_adapter_is_not_known(load: Callable[..., Any]) -> None:
    policy = load("qwen3")
    policy.add_lora([2], rank=4)
    sampler: Any = TextSampler(policy, SamplingLimits())
    assert one_more_block(load_config(None, {}), sampler, None, [], measured=MEASURED) is None  # type: ignore[arg-type]
