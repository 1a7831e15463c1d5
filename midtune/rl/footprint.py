"""What midtune and TRL hold in memory while they train, worked out before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from midtune.model.skeleton import sizes_of
from midtune.rl.trace import Batch, Loaded, block_update, sampling, whole_update
from midtune.savings.budget import Phases, block_phases, standing, unpacked_bytes, whole_phases


@dataclass(frozen=True)
class Work:
    """A step of training, as memory depends on it.

    Attributes:
        prompts: different ones in a step.
        prompt_tokens, new_tokens: of the longest.
        micro_prompts: prompts, with their groups, that go through an update together.
        sampled_prompts: those that are sampled together; None: all.
        optimizer: as in the configuration.
        reference: there is a KL term.
        recompute_tokens: as for `completion_log_probs`.
        unpack: sampling may unpack weights, into up to half of what is free.
        host_embedding: the input embedding lies on the host.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    micro_prompts: int
    sampled_prompts: int | None = None
    optimizer: str = "adamw"
    reference: bool = False
    recompute_tokens: int = 0
    unpack: bool = True
    host_embedding: bool = False

    def batch(self, prompts: int) -> Batch:
        return Batch(prompts, self.group_size, self.prompt_tokens, self.new_tokens)


def midtune_phases(
    model: Loaded, work: Work, *, block: int, trained: int = 1, process: int, capacity: int, loading: int = 0
) -> Phases:
    """Bytes of each part in each phase of a midtune step.

    Args:
        block: the first trained one.
        trained: how many blocks are trained.
        process: bytes that the process holds besides tensors.
        capacity: bytes of the card, or of the host.
        loading: bytes of the checkpoint that are mapped while it is loaded.
    """
    sizes = sizes_of(model.config)
    held = standing(
        sizes,
        "midtune",
        trained=trained,
        quantized=model.quantized,
        dtype_bytes=model.dtype.itemsize,
        optimizer=work.optimizer,
        reference=work.reference,
        on_card=model.on_card,
        host_embedding=work.host_embedding,
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
            recompute_tokens=work.recompute_tokens,
        ),
        states=(work.prompts * work.prompt_tokens + rows * work.new_tokens)
        * sizes.hidden
        * model.dtype.itemsize,
        unpacked=max(0, min(wanted, free // 2)) if work.unpack else 0,
        loading=loading,
    )


def trl_phases(
    model: Loaded, work: Work, arm: str, *, block: int = 0, process: int, checkpointing: bool = True
) -> Phases:
    """Bytes of each part in each phase of a step of one of TRL's arms; see `midtune_phases`."""
    full = arm == "trl-full"
    own = Loaded(model.config, model.dtype, model.quantized and not full, model.on_card)
    held = standing(
        sizes_of(model.config),
        arm,
        trained=1,
        quantized=own.quantized,
        dtype_bytes=model.dtype.itemsize,
        optimizer="adamw",
        reference=work.reference,
        on_card=model.on_card,
    )
    return whole_phases(
        held,
        process,
        sampling=sampling(own, work.batch(work.prompts), shared=False, mixed=full),
        update=whole_update(
            own, work.batch(work.micro_prompts), arm=arm, block=block, checkpointing=checkpointing
        ),
    )
