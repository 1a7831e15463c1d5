"""NVIDIA's published card figures, found by memory or by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from midtune.errors import InputError


@dataclass(frozen=True)
class PublishedCard:
    """A GPU's published figures."""

    name: str
    memory: int  # bytes
    flops: float  # of dense 16-bit matrix products with fp32 accumulation, per second
    bandwidth: float  # memory bytes per second


# NVIDIA's own figures (white papers of each generation, data sheets of the data-centre cards). An amount of memory
# stands for the first card that has it.
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

# Between cards, bytes a second in each direction, at the published peak.
LINKS = {"NVLink of an A100": 300e9, "PCIe 4.0 x16": 32e9, "10-gigabit Ethernet": 1.25e9}

# More than any card has; a larger amount is a typo.
MOST_GIGABYTES = 100_000


def card_named(text: str) -> PublishedCard:
    """Read `24GB` or a card's name (`RTX 4090`, `4090`) with `find_card`; raises InputError if it is neither."""
    card = find_card(text)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise InputError(f"card {text!r} is not known; give its memory, such as 24GB, or one of {known}.")
    return card


def find_card(text: str) -> PublishedCard | None:
    """The card that `24GB`, `RTX 4090` or `4090` means, or None.

    24 GB means 24 x 2^30 bytes, as on a card's box; its speed is that of the smallest card with as much memory.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GIB|G)", text.strip().upper())
    if size and 0 < float(size[1]) <= MOST_GIGABYTES:
        memory = round(float(size[1]) * 2**30)
        like = next((card for card in CARDS if card.memory >= memory), CARDS[-1])
        return PublishedCard(f"{text.strip()} ({like.name})", memory, like.flops, like.bandwidth)
    for card in CARDS:
        # `RTX 4090`, `4090`; `A100 40GB`, `A100`.
        if _plain(text) in (_plain(card.name), _plain(card.name.removeprefix("RTX").split()[0])):
            return card
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
