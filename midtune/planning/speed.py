"""How fast a step could be on a card at best: its published peaks, and what each phase has to compute and move."""

from __future__ import annotations

from midtune.model.sizes import Sizes
from midtune.planning.budget import packed_bytes
from midtune.published import PublishedCard


def step_seconds(
    card: PublishedCard,
    sizes: Sizes,
    arm: str,
    *,
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    new_tokens: int,
    tail: int,
    trained: int,
    quantized: bool,
    unpacked: bool,
    sampling_passes: int,
    update_passes: int,
    again: bool,
    cache: int,
) -> dict[str, float]:
    """The least seconds that the phases of a step can take: what they compute, or what they read, alone.

    Matrix products with weights are counted, attention is not. midtune passes each prompt once for its group and
    updates blocks k to L-1; TRL repeats the prompt for each completion and goes through all blocks.

    Args:
        arm: `midtune`, or one of TRL's.
        tail: blocks from the first trained one on.
        trained: how many are trained.
        unpacked: midtune samples from unpacked weights.
        sampling_passes: parts that completions are sampled in.
        update_passes: micro-batches.
        again: midtune runs blocks again for the gradient; TRL does where it checkpoints.
        cache: bytes of keys and values when all completions are at their end.
    """
    ours = arm == "midtune"
    rows = prompts * group_size
    head = sizes.head or sizes.embedding
    linear = sizes.blocks * sizes.linear
    packed = quantized and not arm.startswith("trl-full")
    weights = sizes.blocks * (packed_bytes(sizes.linear) if packed else 2 * sizes.linear)
    read = 2 * linear if unpacked else weights
    prompt_rows = prompts if ours else rows
    decoded = rows * new_tokens
    sampling = max(
        2.0 * (linear * (prompt_rows * prompt_tokens + decoded) + head * decoded) / card.flops,
        # Each token reads every weight, and of the keys and values half in the mean.
        new_tokens * (sampling_passes * (read + 2 * head) + cache / 2) / card.bandwidth,
    )
    tokens = prompt_rows * prompt_tokens + decoded
    if ours:
        products = tokens * sizes.linear * ((2 + again) * tail + trained) + 2 * decoded * head
        passes = (2 + again) * tail / sizes.blocks
    else:
        checkpointed = arm in ("trl-qlora", "trl-full")
        whole = arm.startswith("trl-full")
        # The gradient of a single block ends there.
        backward = tail if arm == "trl-block" else sizes.blocks
        blocks = sizes.blocks * (1 + checkpointed + whole) + backward + (trained if arm == "trl-block" else 0)
        products = tokens * sizes.linear * blocks + decoded * head * (3 + whole)
        passes = 2.0 + checkpointed
    update = max(2.0 * products / card.flops, update_passes * passes * weights / card.bandwidth)
    return {"sampling": sampling, "update": update}
