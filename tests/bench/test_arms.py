from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.bench.arms import full_training, run_arm
from midtune.bench.workload import BENCHED, Workload
from midtune.config import TrainingConfig
from midtune.model.sources import resolve
from midtune.rl import trainer
from midtune.rl.training import in_order

WORK = Workload(
    prompts=["3 + 4 = 7. 5 + 6", "1 + 1"],
    group_size=4,
    new_tokens=6,
    block=2,
    warmup=1,
    steps=2,
    micro_batch_tokens=10_000,
)


@pytest.fixture(scope="module")
def found(random_checkpoint: Callable[..., Path]) -> dict[str, dict[str, Any]]:
    """What each arm measured on a random checkpoint."""
    source = resolve(str(random_checkpoint("qwen3")))
    return {arm: run_arm(arm, source, WORK, torch.device("cpu"), torch.float32) for arm in BENCHED}


@pytest.mark.parametrize("arm", BENCHED)
def test_every_arm_does_the_same_work(found: dict[str, dict[str, Any]], arm: str) -> None:
    assert found[arm]["completion_tokens"] == 8 * 6
    assert found[arm]["prompt_tokens"] == 4 * sum(map(len, WORK.prompts))


@pytest.mark.parametrize("arm", BENCHED)
def test_phases_make_up_a_step(found: dict[str, dict[str, Any]], arm: str) -> None:
    assert len(found[arm]["steps"]) == 2
    for step in found[arm]["steps"]:
        assert min(step.values()) > 0
        assert step["step"] == pytest.approx(step["rollout"] + step["reward"] + step["update"])


def test_each_arm_trains_what_it_says(found: dict[str, dict[str, Any]]) -> None:
    trained = {arm: figures["trainable"] for arm, figures in found.items()}
    assert trained["trl-full"] == found["trl-full"]["parameters"]
    assert trained["midtune"] == trained["trl-block"] < trained["trl-full"] / 4
    linears = 4 * 7
    assert trained["trl-qlora"] == trained["trl-qlora-fp32"] > linears * 16 * 64


# Of four blocks, midtune runs the upper two, for prompts and for completions. TRL runs each block once, and with
# checkpointing once more for the gradient.
@pytest.mark.parametrize(
    ("arm", "expected"), [("midtune", 4), ("trl-full", 8), ("trl-block", 4), ("trl-qlora", 8)]
)
def test_arms_of_trl_checkpoint_activations(
    random_checkpoint: Callable[..., Path], arm: str, expected: int
) -> None:
    def passes_of(steps: int) -> int:
        passes = 0

        def count(module: torch.nn.Module, *_: Any) -> None:
            nonlocal passes
            passes += type(module).__name__ == "Qwen3MLP" and torch.is_grad_enabled()

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        work = replace(WORK, warmup=0, steps=steps)
        source = resolve(str(random_checkpoint("qwen3")))
        try:
            run_arm(arm, source, work, torch.device("cpu"), torch.float32)
        finally:
            hook.remove()
        return passes

    # The first step of midtune tries first how the update may run.
    assert passes_of(2) - passes_of(1) == expected


def test_an_arm_that_runs_out_of_memory_fails(
    random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "completion_log_probs", short)
    with pytest.raises(torch.OutOfMemoryError):
        run_arm("midtune", resolve(str(random_checkpoint("qwen3"))), WORK, torch.device("cpu"), torch.float32)


def test_full_training_is_measured_on_the_first_prompts_of_a_run(
    random_checkpoint: Callable[..., Path],
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": text}], "question": text}
        for text in ("a", "two words", "third", "some", "five")
    ]
    settings = TrainingConfig(steps=3, prompts_per_step=2, group_size=2, max_new_tokens=4)
    asked: list[str] = []

    def reward(completions: list[Any], question: list[str], **_: Any) -> list[float]:
        asked.extend(question)
        return [float(len(question)) for question in question]

    found = full_training(
        resolve(str(random_checkpoint("qwen3"))),
        rows,
        reward,
        settings,
        seed=3,
        device=torch.device("cpu"),
        dtype=torch.float32,
        steps=2,
    )

    assert found.keys() == {"step", "phases", "peak", "libraries", "completion_length"}
    assert 0 < found["step"] < 60
    assert min(found["phases"].values()) > 0
    assert sum(found["phases"].values()) == pytest.approx(found["step"])
    assert found["peak"] > 2**20
    assert 1 <= found["completion_length"] <= 4
    assert asked[::2] == [row["question"] for row in in_order(rows, 6, seed=3)[:4]]
