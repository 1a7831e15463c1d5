"""How fast a step could be on a card at best: its published peaks, and what each phase has to compute and move."""

from __future__ import annotations

import re
from dataclasses import dataclass

from midtune.errors import InputError
from midtune.savings.budget import Sizes, packed_bytes


@dataclass(frozen=True)
class PublishedCard:
    """A GPU as its maker describes it.

    Attributes:
        memory: bytes.
        flops: of dense 16-bit matrix products that add up in fp32, per second.
        bandwidth: bytes of its memory per second.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float


# NVIDIA's own figures (white papers of each generation, data sheets of the data-centre cards). Of several cards with
# as much memory, the first stands for them where memory alone is asked for.
CARDS = [
    PublishedCard(name, gigabytes * 2**30, tera * 1e12, giga * 1e9)
    for name, gigabytes, tera, giga in (
        ("RTX 4060", 8, 30.2, 272),
        ("RTX 3080", 10, 59.5, 760),
        ("RTX 3060", 12, 25.5, 360),
        ("RTX 4070", 12, 58.3, 504),
        ("T4", 16, 65.1, 320),
        ("RTX 4080", 16, 97.5, 717),
        ("RTX 3090", 24, 71.2, 936),
        ("RTX 4090", 24, 165.2, 1008),
        ("L4", 24, 121, 300),
        ("A10", 24, 125, 600),
        ("RTX 5090", 32, 209.5, 1792),
        ("A100 40GB", 40, 312, 1555),
        ("L40S", 48, 362, 864),
        ("A100 80GB", 80, 312, 2039),
        ("H100", 80, 989, 3350),
    )
]


def card_named(text: str) -> PublishedCard:
    """`24GB`, or the name of a card (`RTX 4090`, `4090`).

    An amount is one of a card, as its box says it: 24 GB are 24 x 2^30 bytes. Times are those of a card with at
    least as much.

    Raises:
        InputError: it is neither.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GIB|G)", text.strip().upper())
    if size and float(size[1]) > 0:
        memory = round(float(size[1]) * 2**30)
        like = next((card for card in CARDS if card.memory >= memory), CARDS[-1])
        return PublishedCard(f"{text.strip()} ({like.name})", memory, like.flops, like.bandwidth)
    plain = _plain(text)
    for card in CARDS:
        # `RTX 4090`, `4090`; `A100 40GB`, `A100`.
        if plain in (_plain(card.name), _plain(card.name.removeprefix("RTX").split()[0])):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise InputError(f"card {text!r} is not known; give its memory, such as 24GB, or one of {known}.")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


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
