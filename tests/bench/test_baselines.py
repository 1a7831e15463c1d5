from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.bench.baselines import full_training
from midtune.config import TrainingConfig
from midtune.model.sources import resolve
from midtune.rl.training import in_order


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
        compute_dtype=torch.float32,
        steps=2,
    )

    assert found.keys() == {"step", "phases", "peak", "completion_length"}
    assert 0 < found["step"] < 60
    assert min(found["phases"].values()) > 0
    assert sum(found["phases"].values()) == pytest.approx(found["step"])
    assert found["peak"] > 2**20
    assert 1 <= found["completion_length"] <= 4
    assert asked[::2] == [row["question"] for row in in_order(rows, 6, seed=3)[:4]]
