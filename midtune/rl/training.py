"""One RL run: derive TRL's settings from midtune's; build, run and take down the trainer."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig

from midtune import processes
from midtune.config import TrainingConfig
from midtune.errors import InputError
from midtune.measure.meter import Meter
from midtune.rl.algorithms import algorithm_arguments, groups_per_micro_batch, own_advantages
from midtune.rl.checks import check_trainable
from midtune.rl.gradients import Bf16Gradients
from midtune.rl.prompts import CANDIDATES, PromptChooser
from midtune.rl.recorder import StepRecorder
from midtune.rl.tail import tail_note, tail_settings
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rl.trust_region import FIRST_RATE, TrustRegion
from midtune.rollout.sampling import Sampler, Sampling
from midtune.rollout.vllm import VLLMSampler
from midtune.tasks import Reward, Row, parts_of

# Settings that TRL gives the same name.
SAME_NAME = "temperature top_p top_k min_p beta warmup_steps weight_decay max_grad_norm".split()
T = TypeVar("T")
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}

logging.getLogger("transformers.trainer").setLevel(logging.ERROR)


def ignore(*_: Any) -> None:
    """Default callback: do nothing."""


def train_blocks(
    sampler: Sampler,
    rows: Sequence[Row],
    reward: Reward,
    settings: TrainingConfig,
    *,
    folder: Path,
    seed: int,
    meter: Meter,
    lr_multipliers: Mapping[int, float] | None = None,
    on_step: Callable[[dict[str, Any]], None] = ignore,
    on_sample: Callable[[dict[str, Any]], None] = ignore,
    on_message: Callable[[str], None] = ignore,
    stop_requested: Callable[[], bool] = lambda: False,
    stop_after: int | None = None,
    checkpoints: bool = True,
    resume_from: Path | None = None,
    update_rows: int | None = None,
) -> int:
    """Train the policy's chosen blocks for `settings.steps` steps; returns the last step's number.

    It is less than `settings.steps` if `stop_requested` or `stop_after` ended the run.

    Args:
        sampler: its policy, already thawed or given LoRA, changes in place. Servers named by `settings.vllm` sample
            in its place.
        rows: training problems, in an order fixed by `seed`; each is used once before any repeats.
        reward: TRL gets the parts of a weighted sum one by one, and logs each.
        lr_multipliers: trained block → factor of its learning rate; default 1.
        stop_after: end after this step, with a checkpoint; schedules still run to `settings.steps`.
        update_rows: most completions that go through an update together, if memory has run out before.

    Raises RunStopped if no group had unequal rewards in the first steps, or a single group does not fit into memory.
    """
    ordered = in_order(rows, settings.steps * settings.prompts_per_step, seed)
    different = [*{row["question"]: row for row in ordered}.values()]
    policy, sampling = sampler.policy, sampling_of(settings)
    for note in tail_note(policy):
        on_message(note)
    longest = max(sampler.prompt_lengths(different))
    if settings.vllm:
        sampler = VLLMSampler(settings.vllm, policy, sampler.limits, folder / "vllm")
    args = trl_arguments(
        settings,
        group_tokens=settings.group_size * (longest + settings.max_new_tokens),
        folder=folder,
        seed=seed,
        device=policy.device,
        checkpoints=checkpoints,
    )
    rewards, weights = parts_of(reward)
    args.reward_weights = weights
    recorder = StepRecorder(
        meter,
        on_step=on_step,
        on_sample=on_sample,
        on_message=on_message,
        stop_requested=stop_requested,
        stop_after=stop_after,
        settings=settings,
    )
    parameters = policy.trained_parameters().values()
    bf16_gradients = Bf16Gradients(parameters) if settings.gradients == "bf16" else None
    trainer = LayerGRPOTrainer(
        sampler,
        sampling,
        args,
        rewards,
        ordered,
        meter=meter,
        callbacks=[recorder],
        lr_multipliers=lr_multipliers,
        tail_arguments=tail_settings(settings, on_card=policy.device.type == "cuda"),
        update_rows=update_rows,
        advantages=own_advantages(settings),
        bf16_gradients=bf16_gradients,
        on_message=on_message,
    )
    trainer.remove_callback(PrinterCallback)
    recorder.trainer = trainer
    if settings.prompts == "auto":
        count = settings.prompts_per_step
        order = in_order(range(len(rows)), settings.steps * count * CANDIDATES, seed)
        # Rows as the trainer's own are: each has the columns of all.
        every_row = Dataset.from_list(list(rows))
        trainer.chooser = PromptChooser(policy, every_row, order, count, count * CANDIDATES)
    if settings.lr == "auto":
        recorder.trust_region = TrustRegion(trainer)
        trainer.add_callback(recorder.trust_region)
    try:
        with bf16_gradients or contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
    finally:
        # TRL and accelerate wrap the model's forward in place; the policy outlives this trainer.
        policy.model.__dict__.pop("forward", None)
        policy.model.eval()
    check_trainable(policy)
    return int(trainer.state.global_step)


def sampling_of(settings: TrainingConfig) -> Sampling:
    """How to draw completions, in training and for scores."""
    same = {field.name: getattr(settings, field.name) for field in fields(Sampling) if field.name != "others"}
    return Sampling(**{**same, "stop_strings": tuple(settings.stop_strings)})


def require_tracker(name: str) -> None:
    """Raise InputError unless the tracker that is to receive metrics is installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(
            f"--report-to {name} needs the package {name}; install it with `pip install {name}`."
        )


def in_order(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` rows: shuffled passes over `rows`, one after the other."""
    shuffler = random.Random(seed)
    ordered: list[T] = []
    while len(ordered) < count:
        ordered += shuffler.sample(list(rows), len(rows))
    return ordered[:count]


def trl_arguments(
    settings: TrainingConfig,
    *,
    group_tokens: int,
    folder: Path,
    seed: int,
    device: torch.device,
    checkpoints: bool,
    mixed_dtype: torch.dtype | None = None,
    activation_checkpointing: bool = False,
) -> GRPOConfig:
    """TRL's configuration of a run; micro-batches are whole groups that divide a step evenly.

    `group_tokens` is the most a group can have; `mixed_dtype` that of TRL's own forward passes, midtune's set theirs.
    With `activation_checkpointing`, TRL's default, blocks keep only their inputs and run again for the gradient.
    Several processes share a step's prompts.
    """
    own = processes.even_share(settings.prompts_per_step)
    groups = groups_per_micro_batch(own, group_tokens, settings.micro_batch_tokens)
    parts = own // groups
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=groups * settings.group_size,
        gradient_accumulation_steps=parts,
        steps_per_generation=parts,
        num_generations=settings.group_size,
        max_completion_length=settings.max_new_tokens,
        generation_kwargs={"stop_strings": settings.stop_strings} if settings.stop_strings else None,
        **{name: getattr(settings, name) for name in SAME_NAME},
        **algorithm_arguments(settings),
        # Losses that balance experts come from a pass through all blocks, which the update does not take.
        router_aux_loss_coef=0.0,
        optim=OPTIMIZERS[settings.optimizer],
        learning_rate=FIRST_RATE if settings.lr == "auto" else settings.lr,
        lr_scheduler_type=settings.lr_schedule,
        max_steps=settings.steps,
        # Rows already come in order, so a resumed run finds its place by counting.
        shuffle_dataset=False,
        save_strategy="steps" if checkpoints else "no",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        report_to=settings.report_to,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=seed,
        use_cpu=device.type == "cpu",
        # TRL's own default is bf16, whatever the device.
        bf16=mixed_dtype == torch.bfloat16,
        fp16=mixed_dtype == torch.float16,
        # Only the constructor turns it on; setting it later has no effect.
        gradient_checkpointing=activation_checkpointing,
        disable_dropout=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    # Otherwise Trainer would copy the model to all visible cards and split groups.
    args._n_gpu = min(args.n_gpu, 1)
    return args
