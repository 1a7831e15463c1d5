"""A process of `test_two_processes.py`: one step of gradient descent, its result saved by the first process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from midtune.model.loading import load_policy
from midtune.model.sources import resolve
from midtune.rl.algorithms import groups_per_micro_batch
from midtune.rl.trust_region import TrustRegion
from tests.rl.toy_training import (
    DecidedSampler,
    question_rows,
    settings_of,
    short_questions_only,
    trainer_of,
)

GROUP_SIZE = 4


def decide(prompts: list[list[int]]) -> list[list[int]]:
    """Completions follow from the prompt and their place in the group."""
    return [
        [3 + (7 * (row % GROUP_SIZE) + len(ids) * t) % 250 for t in range(3 + row % GROUP_SIZE)]
        for row, ids in enumerate(prompts)
    ]


def main(checkpoint: str, out: str, algorithm: str, processes: int) -> None:
    policy = load_policy(resolve(checkpoint), device="cpu")
    policy.thaw(2)
    settings = settings_of(steps=2, algorithm=algorithm, prompts_per_step=4, group_size=GROUP_SIZE)
    assert groups_per_micro_batch(4, 100, settings.micro_batch_tokens) == 4
    trainer = trainer_of(
        DecidedSampler(policy, decide),
        Path(out),
        settings,
        short_questions_only,
        {
            "optim": "sgd",
            "learning_rate": 1.0,
            "per_device_train_batch_size": 4 * GROUP_SIZE // processes,
            "generation_batch_size": 4 * GROUP_SIZE,
        },
    )
    assert trainer.accelerator.num_processes == processes
    # All processes have to fit the step alike.
    trainer.add_callback(TrustRegion(trainer))
    assert len(question_rows()) > 4
    trainer.train()
    if trainer.accelerator.is_main_process:
        trained = {name: value.detach() for name, value in policy.trained_parameters().items()}
        save_file(trained, Path(out) / f"{processes}.safetensors")
    trainer.accelerator.wait_for_everyone()
    # Taking a group of gloo processes down can wait for ever for one that has gone.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:4], processes=int(sys.argv[4]))  # type: ignore[misc]
