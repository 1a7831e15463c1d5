"""Memory of a step as its settings decide, and which setting lowers it: pure arithmetic.

Add a setting that changes memory here, with its effect and its place among the remedies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from midtune.bench.flops import Batch
from midtune.bench.workload import ARMS, LORA_RANK
from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.model.sizes import Sizes
from midtune.planning.budget import Loaded, Phases, Standing, frozen_bytes
from midtune.rl.algorithms import groups_per_micro_batch

ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
# Smallest recompute pack, in tokens.
LEAST_PACK = 512
# Most tokens of a step; the study's has 2 million.
MOST_STEP_TOKENS = 100_000_000
# Settings with a price, the dearest first; undone if later changes made them unnecessary.
DEAREST_FIRST = ("training.gradients", "training.optimizer", "model.unpack", "model.embeddings")


@dataclass(frozen=True)
class Work:
    """A training step as configured; `prompt_tokens` is the length of the longest prompt."""

    config: RunConfig
    prompt_tokens: int

    def changed(self, settings: Mapping[str, Any]) -> Work:
        """The same step with other settings, by dotted key (`training.recompute`)."""
        config = self.config
        for key, value in settings.items():
            part, _, name = key.partition(".")
            own = getattr(config, part).model_copy(update={name: value})
            config = config.model_copy(update={part: own})
        return replace(self, config=config)

    def batch(self, prompts: int | None = None) -> Batch:
        """`prompts` prompts with their groups, at full length; None: the whole step."""
        training = self.config.training
        return Batch(
            training.prompts_per_step if prompts is None else prompts,
            training.group_size,
            self.prompt_tokens,
            training.max_new_tokens,
        )

    @property
    def group_tokens(self) -> int:
        training = self.config.training
        return training.group_size * (self.prompt_tokens + training.max_new_tokens)

    @property
    def micro_prompts(self) -> int:
        """Prompts, with their groups, in one micro-batch of the update."""
        training = self.config.training
        return groups_per_micro_batch(
            training.prompts_per_step, self.group_tokens, training.micro_batch_tokens
        )

    @property
    def sampled_prompts(self) -> int:
        """Prompts, with their groups, that are sampled at once."""
        return self.config.training.sampled_prompts or self.config.training.prompts_per_step

    def described(self) -> dict[str, Any]:
        training, model = self.config.training, self.config.model
        return {
            "prompts": training.prompts_per_step,
            "group_size": training.group_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": training.max_new_tokens,
            "micro_batch_tokens": training.micro_batch_tokens,
            "recompute": training.recompute,
            "sampled_prompts": training.sampled_prompts or None,
            "optimizer": training.optimizer,
            "reference": training.beta > 0,
            "unpack": model.unpack == "auto",
            "host_embedding": model.embeddings == "host",
            "gradients": training.gradients,
        }


def work_of(config: RunConfig, prompt_tokens: int) -> Work:
    """A configuration's step; raises InputError if it has too many tokens."""
    work = Work(config, prompt_tokens)
    if (tokens := config.training.prompts_per_step * work.group_tokens) > MOST_STEP_TOKENS:
        raise InputError(
            f"a step of {work.batch().rows:,} completions with {prompt_tokens:,} tokens of a prompt and "
            f"{config.training.max_new_tokens:,} new ones has {tokens:,} tokens, and at most {MOST_STEP_TOKENS:,} are "
            "planned; ask for fewer prompts, smaller groups or shorter texts."
        )
    return work


def standing(model: Loaded, sizes: Sizes, arm: str, work: Work, *, trained: int) -> Standing:
    """What an arm of `bench.workload.PLANNED` holds throughout a step; TRL trains one block, midtune `trained`."""
    ours, trains = arm == "midtune", ARMS[arm].trains
    training, weight_bytes = work.config.training, model.weight_dtype.itemsize
    optimizer = training.optimizer if ours else "adamw"
    kept = frozen_bytes(model, sizes)
    on_host = ours and model.on_card and work.config.model.embeddings == "host"
    outside = sizes.embedding + sizes.head + sizes.outside - on_host * sizes.lookups
    parts = {
        "blocks" if trains == "all" else "frozen blocks": sizes.blocks * (kept + sizes.rest * weight_bytes),
        "embeddings and head": outside * weight_bytes,
    }
    if trains == "all":
        parameters, bytes_each, largest = sizes.total, 4, max(sizes.embedding, sizes.linear // 2)
    elif trains == "adapters":
        # TRL casts the adapters of a quantized model to bf16, and Adam's moments follow.
        parameters, bytes_each = sizes.blocks * LORA_RANK * sizes.widths, 2
        largest = parameters // sizes.blocks
        parts["adapters"] = parameters * bytes_each
    else:
        frozen = 0 if model.with_experts else sizes.experts
        parameters = (trained if ours else 1) * (sizes.block - frozen)
        bytes_each, largest = 4, (sizes.linear - frozen) // 2
        parts["trained blocks, fp32"] = parameters * 4
    moments = ADAM_BYTES[optimizer] * (bytes_each / 4 if optimizer == "adamw" else 1)
    parts["optimizer"] = round(parameters * moments)
    if training.beta > 0 and trains != "adapters":
        # TRL loads a second model unless it trains adapters.
        parts["reference"] = (parameters if ours else sizes.total) * 4
    # On a card the optimizer updates all tensors at once, with a temporary copy of each.
    temporary = parameters if model.on_card else 2 * largest
    # The tensors as they were, for the trust region; in RAM where there is a card. Later they replace the gradients.
    copied = parameters * 4 if ours and training.lr == "auto" and not model.on_card else 0
    # With bf16 gradients, only one is in fp32 at a time.
    bf16 = ours and training.gradients == "bf16"
    return Standing(
        {name: size for name, size in parts.items() if size},
        parameters * 2 + largest * 4 if bf16 else parameters * bytes_each,
        parameters * bytes_each,
        (temporary * bytes_each if optimizer == "adamw" else 0) + copied,
    )


def leaner(work: Work, phase: str, phases: Phases, memory: int) -> dict[str, Any] | None:
    """The cheapest setting that shrinks `phase`, which holds most, towards `memory` bytes; None if nothing is left.

    Sampling stops unpacking weights, then samples fewer completions at once. The update takes fewer groups at once,
    8-bit optimizer states, bf16 gradients, recomputed activations, then ever smaller recompute packs.
    """
    training = work.config.training
    if phase == "sampling":
        if phases["sampling"]["unpacked weights"]:
            return {"model.unpack": "never"}
        fewer = work.sampled_prompts // 2
        return {"training.sampled_prompts": fewer} if fewer else None
    if phase == "update" and work.micro_prompts > 1:
        # As many groups as fit, if memory is proportional to them, among divisors of a step.
        parts = phases["update"]
        each = (parts["activations"] + parts["workspace"] + parts["heap"]) / work.micro_prompts
        most = work.micro_prompts - (sum(parts.values()) - memory) / each
        divisors = [n for n in range(1, work.micro_prompts) if training.prompts_per_step % n == 0]
        groups = max((n for n in divisors if n <= most), default=1)
        return {"training.micro_batch_tokens": groups * work.group_tokens}
    if phase in ("update", "optimizer") and training.optimizer == "adamw":
        return {"training.optimizer": "adamw_8bit"}
    if phase == "update" and training.gradients == "fp32":
        return {"training.gradients": "bf16"}
    if phase == "update" and not training.recompute:
        return {"training.recompute": True}
    if phase == "update" and training.micro_batch_tokens > LEAST_PACK:
        return {"training.micro_batch_tokens": min(training.micro_batch_tokens, work.group_tokens) // 2}
    return None
