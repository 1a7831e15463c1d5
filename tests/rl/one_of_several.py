"""A process of `test_several_processes.py`: the gradient of a step by each algorithm, saved by the main process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from midtune import processes
from midtune.model.loading import load_policy
from midtune.model.sources import resolve
from midtune.rl.algorithms import ALGORITHMS
from midtune.rl.prompts import PromptChooser
from tests.plain import stop_early
from tests.rl.toy_training import question_rows, settings_of, short_questions_only, trainer_of

# Without gigpo, which needs turns; its loss is dapo's. And once with chosen prompts.
COMPARED: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS if name != "gigpo"},
    "chosen": {"prompts": "auto"},
}


class Keep(TrainerCallback):
    """Keeps the gradients of the first step, and counts the bytes that were averaged for it."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters, self.found = parameters, dict[str, torch.Tensor]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}


def gradients(checkpoint: Path, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient of a step on six prompts, in micro-batches of two groups at most, and the step's metrics."""
    policy = load_policy(resolve(str(checkpoint)), device="cpu")
    stop_early(policy)
    policy.thaw(2)
    settings = settings_of(steps=1, prompts_per_step=6, micro_batch_tokens=200, **changes)
    trainer = trainer_of(policy, folder, settings, short_questions_only)
    if settings.prompts == "auto":
        trainer.chooser = chooser = PromptChooser(policy, rows := question_rows() * 2, range(12), 6, 12)
        values = torch.tensor([float(len(row["question"]) < 5) for row in rows * 3])
        chooser.load({"rows": torch.arange(36) % 12, "values": values})
    keep = Keep(policy.trained_parameters())
    trainer.add_callback(keep)
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "reward" in log)
    for name in ("reward", "reward_std", "loss", "completions/mean_length", "frac_reward_zero_std"):
        keep.found[f"logged {name}"] = torch.tensor(logged[name], dtype=torch.float64)
    return keep.found


def main(checkpoint: str, out: str) -> None:
    sent = 0
    plain = torch.distributed.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return plain(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    with processes.together(lambda: True):
        for name, settings in COMPARED.items():
            sent = 0
            found = gradients(Path(checkpoint), Path(out), **settings)
            found["sent"] = torch.tensor(sent)
            if processes.is_main():
                save_file(found, Path(out) / f"{name}-{processes.count()}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
