"""The arms of `midtune bench`: the same prompts and the same completions through midtune and through TRL.

Every arm samples with its own code, but each token is decided beforehand, so all arms do the same work token for
token. TRL's arms keep TRL's defaults, including activation checkpointing, except for `trl-block`.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import GRPOConfig, GRPOTrainer

from midtune.bench.curve import Curve
from midtune.bench.flops import Batch, rollout_flops, update_flops
from midtune.bench.profile import BenchMeter, Profile, operators_per_token, peak_flops_per_s
from midtune.bench.workload import ARMS, STOCK_RATE, Workload, qlora
from midtune.config import TrainingConfig
from midtune.measure.meter import Meter
from midtune.model.architectures import built, text_class
from midtune.model.configs import read_config
from midtune.model.loading import load_policy, load_tokenizer
from midtune.model.memory import give_back
from midtune.model.policy import Policy, count_parameters
from midtune.model.quantize import forbid_cpu_packing, nf4_config
from midtune.model.sizes import sizes_of
from midtune.model.sources import Source
from midtune.rl.tail import SHARED, tail_kind
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rl.training import in_order, train_blocks, trl_arguments
from midtune.rl.trust_region import TrustRegion
from midtune.rollout.decoding import ready_to_sample
from midtune.rollout.engine import serves
from midtune.rollout.sampling import Sampling, SamplingLimits
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import TextSampler
from midtune.tasks import Reward, Row


def run_arm(
    arm: str, source: Source, work: Workload, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Run one arm in this process, which should have done nothing else.

    Returns `steps`: seconds of each measured step, by phase; `peak` and `libraries`: peak bytes, and bytes before the
    model was loaded; `prompt_tokens`, `completion_tokens`: of a step; `trainable`: parameters; with profiling,
    `profile`, `flops` and `peak_flops_per_s`.
    """
    meter = BenchMeter(device)
    libraries = meter.current_bytes()
    meter.reset_peak()
    tokenizer = load_tokenizer(source)
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in work.prompts]
    completions = _completions(tokenizer, work)
    rewards = [float(row % work.group_size) for row in range(len(completions))]
    settings = TrainingConfig(
        lr="auto" if arm == "midtune" else STOCK_RATE,
        steps=work.warmup + work.steps + work.profile,
        beta=0.0,
        prompts_per_step=len(work.prompts),
        group_size=work.group_size,
        max_new_tokens=work.new_tokens,
        micro_batch_tokens=work.micro_batch_tokens,
    )
    rows = [{"prompt": prompt} for prompt in work.prompts] * settings.steps
    watched = Profile(meter, device, settings.steps) if work.profile else None
    with _arguments(arm, settings, max(lengths), work.seed, device, dtype) as args:
        if arm == "midtune":
            policy = load_policy(source, device=str(device), dtype=dtype)
            policy.thaw(work.block)
            sampler = TextSampler(policy, SamplingLimits())
            # Before completions are decided.
            with ready_to_sample(policy, len(completions), unpack=False):
                serves(policy, sampler.limits)
            sampling = Sampling(work.new_tokens, group_size=work.group_size)
            trainer = LayerGRPOTrainer(sampler, sampling, args, [lambda **_: rewards], rows, meter=meter)
            # Skip the log-prob check: a decided token has probability 1 in sampling, not in the update.
            trainer._compared = True
            trainer.add_callback(TrustRegion(trainer))
            # An arm does its work in full-size batches, or fails.
            sampler.limits.rows.halves = trainer.update_rows.halves = False
        else:
            policy = stock_policy(arm, source, device, dtype)
            trainer = stock_trainer(arm, policy, args, rows, lambda **_: rewards, meter, [work.block])
        meter.during_rollout = partial(_decided, trainer.model, completions)
        steps = _train(trainer, meter, watched)
    model = trainer.model
    found = {
        "arm": arm,
        "steps": steps[work.warmup : work.warmup + work.steps],
        "peak": watched.peak if watched is not None else meter.peak_bytes(),
        "libraries": libraries,
        "memory_source": meter.source,
        "prompt_tokens": work.group_size * sum(lengths),
        "completion_tokens": round(_mean_length(trainer) * len(completions)),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": count_parameters(model),
    }
    if watched is not None:
        batch = Batch(len(work.prompts), work.group_size, max(lengths), work.new_tokens)
        sizes = sizes_of(model.config)
        found["profile"] = watched.found
        found["flops"] = {
            "rollout": rollout_flops(sizes, batch, arm),
            "update": update_flops(
                sizes,
                batch,
                arm,
                tail=sizes.blocks - work.block,
                trained=1,
                checked=arm == "midtune",
                kind=tail_kind(policy, work.block) if arm == "midtune" else SHARED,
            ),
        }
        found["peak_flops_per_s"] = peak_flops_per_s(device, dtype)
        if arm == "midtune":
            ids = [prompt_ids(policy.tokenizer, prompt) for prompt in work.prompts]
            found["operators"] = operators_per_token(policy, ids, work.group_size)
    return found


def full_training(
    source: Source,
    rows: Sequence[Row],
    reward: Reward,
    settings: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
) -> dict[str, Any]:
    """Train every parameter with TRL's trainer for a few steps, on a midtune run's prompts and micro-batch size.

    Completions are sampled freely. `settings` are the run's: all its steps are put in order and the first ones run.
    Weights are in fp32, activations in `dtype`.

    Returns `step`: seconds of the fastest step (the first one also warms up); `phases`: its `rollout`, `reward` and
    `update`; `peak` and `libraries`: peak bytes while training, and bytes before the model was loaded;
    `completion_length`: mean tokens of a completion.
    """
    meter = Meter(device)
    libraries = meter.current_bytes()
    prompts = settings.prompts_per_step
    ordered = in_order(rows, settings.steps * prompts, seed)[: steps * prompts]
    tokenizer = load_tokenizer(source)
    longest = max(len(prompt_ids(tokenizer, row["prompt"])) for row in ordered)
    lr = STOCK_RATE if settings.lr == "auto" else settings.lr
    few = settings.model_copy(update={"steps": steps, "lr": lr})
    with _arguments("trl-full", few, longest, seed, device, dtype) as args:
        policy = stock_policy("trl-full", source, device, dtype)
        trainer = stock_trainer("trl-full", policy, args, ordered, reward, meter)
        meter.reset_peak()
        timed = _train(trainer, meter)
    fastest = min(timed, key=lambda step: step["step"])
    return {
        "step": fastest.pop("step"),
        "phases": fastest,
        "peak": meter.peak_bytes(),
        "libraries": libraries,
        "completion_length": _mean_length(trainer),
    }


def learn(
    arm: str,
    source: Source,
    rows: Sequence[Row],
    reward: Reward,
    settings: TrainingConfig,
    blocks: Sequence[int],
    curve: Curve,
    *,
    quantize: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Train an arm on a run's prompts in its order, scored along `curve`, until that is done.

    `blocks` are those of an arm that trains blocks, over others held as `quantize` says. Weights and activations are
    those of `full_training`.

    Returns the curve's `points`; `peak` and `libraries`: peak bytes while training, and bytes before the model was
    loaded; `memory_source`; `trainable`: parameters.
    """
    meter = curve.meter
    give_back()
    libraries = meter.current_bytes()
    policy = stock_policy(arm, source, device, dtype, quantize)
    curve.begin(policy)
    if arm == "midtune":
        for block in blocks:
            policy.thaw(block)
        with tempfile.TemporaryDirectory() as scratch:
            train_blocks(
                TextSampler(policy, SamplingLimits()),
                rows,
                reward,
                settings,
                folder=Path(scratch),
                seed=seed,
                meter=meter,
                on_step=lambda metrics: curve.after(metrics["step"], metrics["step_s"]),
                stop_requested=lambda: curve.reached,
                checkpoints=False,
            )
    else:
        ordered = in_order(rows, settings.steps * settings.prompts_per_step, seed)
        longest = max(len(prompt_ids(policy.tokenizer, row["prompt"])) for row in ordered)
        with _arguments(arm, settings, longest, seed, device, dtype) as args:
            _train(stock_trainer(arm, policy, args, ordered, reward, meter, blocks), meter, curve=curve)
    return {
        "points": curve.points,
        "peak": curve.peak,
        "libraries": libraries,
        "memory_source": meter.source,
        "trainable": sum(p.numel() for p in policy.model.parameters() if p.requires_grad),
    }


def stock_policy(
    arm: str, source: Source, device: torch.device, dtype: torch.dtype, quantize: str = "nf4"
) -> Policy:
    """An arm's model, nothing of it trained yet; `quantize` is how blocks lie that stay frozen around a trained one."""
    if ARMS[arm].trains == "blocks":
        return load_policy(source, quantize=quantize, device=str(device), dtype=dtype)
    full = ARMS[arm].trains == "all"
    with torch.device("meta"):
        skeleton = built(read_config(source.folder, source.name))
    model = text_class(skeleton).from_pretrained(
        source.folder,
        config=skeleton.config,
        # Trained weights in fp32, as RL learning rates need; frozen ones in the compute dtype.
        dtype=torch.float32 if full else dtype,
        device_map={"": device},
        use_safetensors=True,
        **({} if full else {"quantization_config": nf4_config(dtype, keep=["lm_head"])}),
    )
    forbid_cpu_packing(model)
    return Policy(model, load_tokenizer(source), source, compute_dtype=dtype)


def stock_trainer(
    arm: str,
    policy: Policy,
    args: GRPOConfig,
    rows: Sequence[Row],
    reward: Reward,
    meter: Meter,
    blocks: Sequence[int] = (),
) -> GRPOTrainer:
    """TRL's trainer on a `stock_policy`, charging `rollout` and `reward` to the meter; `trl-block` trains `blocks`."""
    tokenizer, model = policy.tokenizer, policy.model
    if ARMS[arm].trains == "blocks":
        for block in blocks:
            policy.thaw(block)
    elif ARMS[arm].trains == "all":
        model.requires_grad_(True)
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[meter.phase("reward")(reward)],
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=qlora() if ARMS[arm].trains == "adapters" else None,
    )
    if arm == "trl-qlora-fp32":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # Stop strings need the tokenizer, and TRL does not pass it on.
    sample = partial(trainer.model.generate, tokenizer=tokenizer)
    trainer.model.generate = meter.phase("rollout")(sample)
    return trainer


class _Clock(TrainerCallback):
    """Seconds of each step, by phase; see `Meter.end_step`. A `curve` ends training once it has reached its target."""

    def __init__(self, meter: Meter, curve: Curve | None = None) -> None:
        self.steps: list[dict[str, float]] = []
        self._meter, self._curve = meter, curve

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._meter.begin_step()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.append(self._meter.end_step())
        if self._curve is not None:
            self._curve.after(state.global_step, self.steps[-1]["step"])
            control.should_training_stop |= self._curve.reached


@contextlib.contextmanager
def _arguments(
    arm: str, settings: TrainingConfig, longest: int, seed: int, device: torch.device, dtype: torch.dtype
) -> Iterator[GRPOConfig]:
    """TRL's settings of an arm, with a temporary folder; `longest` is tokens of the longest prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        yield trl_arguments(
            settings,
            group_tokens=settings.group_size * (longest + settings.max_new_tokens),
            folder=Path(scratch),
            seed=seed,
            device=device,
            mixed_dtype=None if arm == "midtune" else dtype,
            checkpoints=False,
            activation_checkpointing=ARMS[arm].checkpointing,
        )


def _train(
    trainer: GRPOTrainer, meter: Meter, watched: Profile | None = None, curve: Curve | None = None
) -> list[dict[str, float]]:
    clock = _Clock(meter, curve)
    trainer.add_callback(clock)
    if watched is not None:
        trainer.add_callback(watched)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.steps


def _mean_length(trainer: GRPOTrainer) -> float:
    """Mean tokens of a completion."""
    logs = trainer.state.log_history
    return statistics.fmean(log["completions/mean_length"] for log in logs if "reward" in log)


def _completions(tokenizer: Any, work: Workload) -> torch.Tensor:
    """Token ids [N·G, C] without special tokens; the first token is the same within a group."""
    generator = torch.Generator().manual_seed(work.seed)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    rows = len(work.prompts) * work.group_size
    drawn = torch.tensor(ordinary)[torch.randint(len(ordinary), (rows, work.new_tokens), generator=generator)]
    # midtune makes the first token's logits once per prompt.
    drawn[:, 0] = drawn[:: work.group_size, 0].repeat_interleave(work.group_size)
    return drawn


@contextlib.contextmanager
def _decided(model: Any, completions: torch.Tensor) -> Iterator[None]:
    """While inside, the head's n-th call gives all probability to the n-th token of each completion."""
    table = completions.to(model.device)
    # On the device, since a card may replay the call.
    step = torch.zeros(1, dtype=torch.long, device=table.device)

    def decide(head: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        called = logits.size(0)
        # Rows of a call are prompts, completions, or slots, of which the last may be idle.
        if called < len(table):
            wanted = table[:: len(table) // called]
        else:
            wanted = torch.cat([table, table[-1:].expand(called - len(table), -1)])
        wanted = wanted.index_select(1, step.clamp(max=table.size(1) - 1))
        step.add_(1)
        decided = torch.full_like(logits[:, -1:], -torch.inf)
        return decided.scatter_(-1, wanted[:, None], 0.0)

    with model.get_output_embeddings().register_forward_hook(decide):
        yield
