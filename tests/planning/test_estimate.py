from __future__ import annotations

from typing import Any

import pytest

from midtune.bench.flops import Batch, update_flops
from midtune.config import RunConfig, load_config
from midtune.planning.estimate import estimated_phases
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
