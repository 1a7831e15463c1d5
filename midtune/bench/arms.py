"""The arms of `midtune bench`: the same prompts and the same completions through midtune and through TRL.

Every arm samples with its own code, but each token is decided beforehand, so that all arms do equal work
token for token. TRL's arms keep TRL's defaults, activation checkpointing among them, but for the one that trains
a single block: with checkpointing, transformers takes the gradient down to the embeddings.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from midtune.bench.baselines import StepClock
from midtune.bench.profile import Profile, peak_flops_per_s, product_flops
from midtune.config import TrainingConfig
from midtune.measure.meter import Meter
from midtune.model.loading import load_policy, load_tokenizer
from midtune.model.policy import count_parameters
from midtune.model.quantize import forbid_cpu_packing, nf4_config
from midtune.model.sources import Source
from midtune.rl.trainer import LayerGRPOTrainer
from midtune.rl.training import trl_arguments
from midtune.rollout.sampling import Sampling, SamplingLimits
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import TextSampler

ARMS = {
    "midtune": "midtune",
    "trl-full": "TRL, all parameters",
    "trl-block": "TRL, the same block over NF4",
    "trl-qlora": "TRL, QLoRA on all linear layers",
    "trl-qlora-fp32": "the same, adapters in fp32",
}
LORA_RANK = 16


@dataclass(frozen=True)
class Workload:
    """What every arm computes.

    Args:
        prompts: texts, as many for each step.
        new_tokens: tokens of every completion.
        block: the block that midtune and `trl-block` train.
        warmup, steps: steps that are not counted, and that are.
        profile: profile one more step.
    """

    prompts: list[str]
    group_size: int
    new_tokens: int
    block: int
    warmup: int
    steps: int
    micro_batch_tokens: int
    seed: int = 0
    profile: bool = False


def run_arm(
    arm: str, source: Source, work: Workload, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Run one arm in this process, which should have done nothing else.

    Returns:
        `steps`: seconds of each counted step, by phase; `peak` and `libraries`: peak bytes since before the
        model was loaded, and what the process held by then; `prompt_tokens`, `completion_tokens`: of a
        step; `trainable`: parameters; `profile` and `peak_flops_per_s`, where asked for.
    """
    meter = Meter(device)
    libraries = meter.current_bytes()
    meter.reset_peak()
    tokenizer = load_tokenizer(source)
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in work.prompts]
    completions = _completions(tokenizer, work)
    rewards = [float(row % work.group_size) for row in range(len(completions))]
    settings = TrainingConfig(
        steps=work.warmup + work.steps + work.profile,
        beta=0.0,
        prompts_per_step=len(work.prompts),
        group_size=work.group_size,
        max_new_tokens=work.new_tokens,
        micro_batch_tokens=work.micro_batch_tokens,
    )
    clock = StepClock(meter)
    with tempfile.TemporaryDirectory() as scratch:
        args = trl_arguments(
            settings,
            group_tokens=work.group_size * (max(lengths) + work.new_tokens),
            folder=Path(scratch),
            seed=work.seed,
            device=device,
            mixed_dtype=None if arm == "midtune" else dtype,
            checkpoints=False,
            activation_checkpointing=arm not in ("midtune", "trl-block"),
        )
        rows = [{"prompt": prompt} for prompt in work.prompts] * settings.steps
        trainer = _trainer(arm, source, work, device, dtype, args, rows, lambda **_: rewards, meter)
        trainer.forced = completions
        trainer.add_callback(clock)
        watched = Watched(trainer, meter, settings.steps) if work.profile else None
        if watched is not None:
            trainer.add_callback(watched)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model = trainer.model
    return {
        "arm": arm,
        "steps": clock.steps[work.warmup : work.warmup + work.steps],
        "peak": watched.peak if watched is not None else meter.peak_bytes(),
        "libraries": libraries,
        "memory_source": meter.source,
        "prompt_tokens": work.group_size * sum(lengths),
        "completion_tokens": round(
            statistics.fmean(
                log["completions/mean_length"] for log in trainer.state.log_history if "reward" in log
            )
            * len(completions)
        ),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": count_parameters(model),
        **(_profile(watched, trainer, work, lengths, device, dtype) if watched is not None else {}),
    }


class Watched(TrainerCallback):
    """Profiles the last step of a trainer: its `rollout` and, as `update`, what follows."""

    def __init__(self, trainer: Any, meter: Meter, last: int) -> None:
        self.trainer = trainer
        self.meter = meter
        self.last = last
        self.profile = Profile(trainer.accelerator.device)
        self.found: dict[str, dict[str, float]] = {}

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.last - 1:
            # What the profiler remembers takes memory too.
            self.peak = self.meter.peak_bytes()
            self.profile.start()
            self.trainer.profile = self.profile
            self._update = contextlib.ExitStack()
            self.trainer.after_rollout = lambda: self._update.enter_context(self.profile.phase("update"))

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            self._update.close()
            self.found = self.profile.stop()


def _profile(
    watched: Watched,
    trainer: Any,
    work: Workload,
    lengths: list[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The profile, and the floating-point operations of the weights where midtune's are known."""
    policy = getattr(trainer, "policy", None)
    flops = {}
    if policy is not None:
        linears = [part for part in policy.blocks[0].modules() if isinstance(part, torch.nn.Linear)]
        head = policy.model.get_output_embeddings()
        sizes = {
            "block": sum(part.in_features * part.out_features for part in linears),
            "head": head.in_features * head.out_features,
            "blocks": policy.num_blocks,
            "tail": policy.num_blocks - work.block,
        }
        rows = len(work.prompts) * work.group_size
        tokens = {"prompt_tokens": max(lengths), "new_tokens": work.new_tokens}
        flops = product_flops(sizes, {"prompts": len(work.prompts), "rows": rows, **tokens})
    return {"profile": watched.found, "flops": flops, "peak_flops_per_s": peak_flops_per_s(device, dtype)}


class _Forced:
    """A trainer whose completions are decided beforehand; sampling is its own, and timed."""

    forced: torch.Tensor
    meter: Meter
    model: Any
    profile: Profile | None = None
    after_rollout: Any = None

    def _decide(self, sample: Callable[..., Any], *args: Any) -> Any:
        watched = self.profile.phase("rollout") if self.profile else contextlib.nullcontext()
        with self.meter.phase("rollout"), _decided(self.model, self.forced), watched:
            found = sample(*args)
        if self.profile:
            self.after_rollout()
        return found


class _Midtune(_Forced, LayerGRPOTrainer):
    def _sample(self, *args: Any) -> Any:
        return self._decide(super()._sample, *args)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A decided token has the probability 1 while it is sampled, and another one in the update.
        self._compared = True
        # An arm does all of the work together, or fails.
        self.sampler.limits.rows.halves = self.update_rows.halves = False


class _Stock(_Forced, GRPOTrainer):
    def __init__(self, *args: Any, meter: Meter, **kwargs: Any) -> None:
        self.meter = meter
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args: Any) -> Any:
        return self._decide(super()._generate_single_turn, *args)


def _trainer(
    arm: str,
    source: Source,
    work: Workload,
    device: torch.device,
    dtype: torch.dtype,
    args: Any,
    rows: list[dict[str, Any]],
    reward: Any,
    meter: Meter,
) -> Any:
    if arm in ("midtune", "trl-block"):
        policy = load_policy(source, device=str(device), dtype=dtype)
        policy.thaw(work.block)
        if arm == "midtune":
            sampler = TextSampler(policy, SamplingLimits())
            return _Midtune(sampler, Sampling(work.new_tokens), args, [reward], rows, meter=meter)
        model = policy.model
    else:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            # All parameters in fp32, as RL learning rates need; frozen ones as they are computed with.
            dtype=torch.float32 if arm == "trl-full" else dtype,
            device_map={"": device},
            use_safetensors=True,
            **({} if arm == "trl-full" else {"quantization_config": nf4_config(dtype, keep=["lm_head"])}),
        )
        forbid_cpu_packing(model)
    trainer = _Stock(
        model=model,
        args=args,
        reward_funcs=[reward],
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(source),
        peft_config=qlora() if "qlora" in arm else None,
        meter=meter,
    )
    if arm == "trl-qlora-fp32":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def qlora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _completions(tokenizer: Any, work: Workload) -> torch.Tensor:
    """Token ids [N·G, C] that end nothing; the first one is the same within a group."""
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
    step = 0

    def decide(head: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal step
        wanted = completions[:: len(completions) // logits.size(0), step].to(logits.device)
        step += 1
        decided = torch.full_like(logits[:, -1:], -torch.inf)
        return decided.scatter_(-1, wanted[:, None, None], 0.0)

    hook = model.get_output_embeddings().register_forward_hook(decide)
    try:
        yield
    finally:
        hook.remove()
