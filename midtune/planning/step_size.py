"""What midtune and TRL hold in memory while they train, worked out before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from midtune.bench.arms import LORA_RANK
from midtune.planning.budget import Phases, block_phases, standing, unpacked_bytes, whole_phases
from midtune.model.sizes import Sizes
from midtune.planning.trace import Batch, Loaded, block_update, sampling, whole_update
from midtune.rl.algorithms import groups_per_micro_batch


@dataclass(frozen=True)
class Work:
    """A step of training, as memory depends on it.

    Attributes:
        prompts: different ones in a step.
        prompt_tokens, new_tokens: of the longest.
        micro_batch_tokens: most tokens in one backward pass; a single group may have more.
        recompute: blocks hold no activations in the update but run again, so many tokens at a time.
        sampled_prompts: prompts, with their groups, that are sampled together; None: all.
        optimizer: as in the configuration.
        reference: there is a KL term.
        unpack: sampling may unpack weights, into up to half of what is free.
        host_embedding: the input embedding is kept on the host.
        gradients: as in the configuration.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    micro_batch_tokens: int
    recompute: bool = False
    sampled_prompts: int | None = None
    optimizer: str = "adamw"
    reference: bool = False
    unpack: bool = True
    host_embedding: bool = False
    gradients: str = "fp32"

    @property
    def group_tokens(self) -> int:
        return self.group_size * (self.prompt_tokens + self.new_tokens)

    @property
    def micro_prompts(self) -> int:
        """Prompts, with their groups, that go through an update together."""
        return groups_per_micro_batch(self.prompts, self.group_tokens, self.micro_batch_tokens)

    def batch(self, prompts: int) -> Batch:
        return Batch(prompts, self.group_size, self.prompt_tokens, self.new_tokens)


def midtune_phases(
    model: Loaded,
    sizes: Sizes,
    work: Work,
    *,
    block: int,
    trained: int = 1,
    process: int,
    capacity: int,
) -> Phases:
    """Bytes of each part in each phase of a midtune step.

    Args:
        block: the first trained one.
        trained: how many blocks are trained.
        process: bytes that the process holds besides tensors.
        capacity: bytes of the card, or of the host.
    """
    held = standing(
        sizes,
        "midtune",
        trained=trained,
        quantized=model.quantized,
        dtype_bytes=model.dtype.itemsize,
        optimizer=work.optimizer,
        reference=work.reference,
        on_card=model.on_card,
        host_embedding=work.host_embedding and model.on_card,
        bf16_gradients=work.gradients == "bf16",
    )
    free = capacity - process - sum(held.parts.values())
    wanted = unpacked_bytes(
        sizes, quantized=model.quantized, dtype_bytes=model.dtype.itemsize, laid_out=not model.on_card
    )
    rows = work.prompts * work.group_size
    return block_phases(
        held,
        process,
        sampling=sampling(model, work.batch(work.sampled_prompts or work.prompts), shared=True),
        update=block_update(
            model,
            work.batch(work.micro_prompts),
            tail_blocks=sizes.blocks - block,
            trained=trained,
            recompute_tokens=work.micro_batch_tokens if work.recompute else 0,
        ),
        states=(work.prompts * work.prompt_tokens + rows * work.new_tokens)
        * sizes.hidden
        * model.dtype.itemsize,
        unpacked=max(0, min(wanted, free // 2)) if work.unpack else 0,
        on_card=model.on_card,
    )


def trl_phases(
    model: Loaded,
    sizes: Sizes,
    work: Work,
    arm: str,
    *,
    block: int = 0,
    process: int,
    checkpointing: bool = True,
) -> Phases:
    """Bytes of each part in each phase of a step of one of TRL's arms; see `midtune_phases`."""
    full = arm == "trl-full"
    own = _unquantized(model) if full else model
    held = standing(
        sizes,
        arm,
        trained=1,
        quantized=own.quantized,
        dtype_bytes=model.dtype.itemsize,
        optimizer="adamw",
        reference=work.reference,
        on_card=model.on_card,
        lora_rank=LORA_RANK,
    )
    return whole_phases(
        held,
        process,
        sampling=sampling(own, work.batch(work.prompts), shared=False, mixed=full),
        update=whole_update(
            own,
            work.batch(work.micro_prompts),
            arm=arm,
            block=block,
            # With it, transformers takes the gradient of a single block down to the embeddings.
            checkpointing=checkpointing and arm != "trl-block",
        ),
        on_card=model.on_card,
    )


@functools.cache
def _unquantized(model: Loaded) -> Loaded:
    return replace(model, quantized=False)
