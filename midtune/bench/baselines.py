"""Plain TRL training of every parameter, for comparison."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from midtune.config import TrainingConfig
from midtune.measure.meter import Meter
from midtune.model.loading import load_tokenizer
from midtune.model.sources import Source
from midtune.rl.training import in_order, trl_arguments
from midtune.rollout.speech import prompt_ids
from midtune.tasks import Reward, Row


class StepClock(TrainerCallback):
    """Seconds of each step, `step`, and of its phases: `rollout` as charged to the meter, `update` the rest.

    `reward`, which is a part of `update`, is as charged too.
    """

    def __init__(self, meter: Meter) -> None:
        self.steps: list[dict[str, float]] = []
        self._meter = meter

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._meter.step()
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        charged = self._meter.step()
        step = time.perf_counter() - self._began
        rollout, reward = charged.get("rollout", 0.0), charged.get("reward", 0.0)
        self.steps.append({"step": step, "rollout": rollout, "reward": reward, "update": step - rollout})


def full_training(
    source: Source,
    rows: Sequence[Row],
    reward: Reward,
    settings: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    steps: int,
) -> dict[str, Any]:
    """Train every parameter with TRL's own trainer for a few steps, on the prompts of a midtune run.

    Weights are fp32, as RL learning rates need; TRL's defaults otherwise, gradient checkpointing among
    them. Micro-batches are those of midtune.

    Returns:
        `step`: seconds of the fastest step (the first one also warms up); `phases`: those of its `rollout`,
        `reward` and `update`; `peak`: peak bytes while training; `completion_length`: mean tokens of a
        completion.
    """
    meter = Meter(device)
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, device_map={"": device}, use_safetensors=True
    )
    tokenizer = load_tokenizer(source)
    # Stop strings need it, and TRL does not pass it on.
    model.generate = partial(model.generate, tokenizer=tokenizer)
    ordered = in_order(rows, settings.steps * settings.prompts_per_step, seed)[
        : steps * settings.prompts_per_step
    ]
    longest = max(len(prompt_ids(tokenizer, row["prompt"])) for row in ordered)
    clock = StepClock(meter)
    with tempfile.TemporaryDirectory() as scratch:
        args = trl_arguments(
            settings.model_copy(update={"steps": steps}),
            group_tokens=settings.group_size * (longest + settings.max_new_tokens),
            folder=Path(scratch),
            seed=seed,
            device=device,
            mixed_dtype=compute_dtype,
            checkpoints=False,
            activation_checkpointing=True,
        )
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=[_timed(reward, meter, "reward")],
            train_dataset=Dataset.from_list(ordered),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer._generate_single_turn = _timed(trainer._generate_single_turn, meter, "rollout")
        trainer.remove_callback(PrinterCallback)
        meter.reset_peak()
        trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "reward" in log]
    fastest = min(clock.steps, key=lambda step: step["step"])
    return {
        "step": fastest["step"],
        "phases": {
            "rollout": fastest["rollout"],
            "reward": fastest["reward"],
            "update": fastest["update"] - fastest["reward"],
        },
        "peak": meter.peak_bytes(),
        "completion_length": sum(lengths) / len(lengths),
    }


def _timed(function: Callable[..., Any], meter: Meter, phase: str) -> Callable[..., Any]:
    """The same function, its time charged to a phase."""

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(phase):
            return function(*args, **kwargs)

    return timed
