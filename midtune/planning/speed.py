"""How fast a step could be on a card at best: its published peaks, and what each phase has to compute and move."""

from __future__ import annotations

from midtune.bench.flops import rollout_flops, update_flops
from midtune.model.sizes import Sizes
from midtune.planning.budget import packed_bytes
from midtune.planning.step_size import Work
from midtune.published import PublishedCard


def step_seconds(
    card: PublishedCard,
    sizes: Sizes,
    arm: str,
    work: Work,
    *,
    tail: int,
    trained: int,
    quantized: bool,
    unpacked: bool,
    cache: int,
) -> dict[str, float]:
    """The least seconds that the phases of a step can take: what they compute, or what they read, alone.

    The forward pass of a KL term's reference is left out.

    Args:
        arm: see `update_flops`.
        tail: blocks from the first trained one on.
        trained: how many are trained.
        unpacked: midtune samples from unpacked weights.
        cache: bytes of keys and values when all completions are at their end.
    """
    batch, training = work.batch(), work.config.training
    packed = quantized and not arm.startswith("trl-full")
    weights = sizes.blocks * (packed_bytes(sizes.linear) if packed else 2 * sizes.linear)
    read = 2 * sizes.blocks * sizes.linear if unpacked else weights
    sampling_passes = -(-batch.prompts // work.sampled_prompts)
    sampling = max(
        rollout_flops(sizes, batch, arm) / card.flops,
        # Each token reads every weight, and on average half of the keys and values.
        batch.new_tokens * (sampling_passes * (read + 2 * sizes.projection) + cache / 2) / card.bandwidth,
    )
    products = update_flops(sizes, batch, arm, tail=tail, trained=trained, recompute=training.recompute)
    if arm == "midtune":
        passes = (2 + training.recompute) * tail / sizes.blocks
    else:
        passes = 2.0 + (arm in ("trl-qlora", "trl-full"))
    micro_batches = batch.prompts // work.micro_prompts
    update = max(products / card.flops, micro_batches * passes * weights / card.bandwidth)
    return {"sampling": sampling, "update": update}
