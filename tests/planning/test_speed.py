import math

import pytest

from midtune.errors import InputError
from midtune.planning.budget import Sizes
from midtune.planning.speed import step_seconds
from midtune.published import CARDS, PublishedCard, card_named


def test_a_card_by_its_memory_or_by_its_name() -> None:
    assert (card_named("24GB").memory, card_named("24 gb").flops) == (24 * 2**30, 71.2e12)
    assert card_named("20GB").name == "20GB (RTX 3090)" and card_named("20GB").memory == 20 * 2**30
    assert card_named("4090").name == card_named("rtx-4090").name == "RTX 4090"
    assert card_named("a100 80gb").memory == 80 * 2**30
    assert card_named("1TB".replace("1T", "999G")[:-1]).flops == CARDS[-1].flops


@pytest.mark.parametrize("text", ["", "0GB", "-3GB", "lots", "GB"])
def test_what_is_no_card_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(InputError, match="give its memory, such as 24GB, or one of RTX 4060"):
        card_named(text)


SIZES = Sizes(blocks=4, linear=1000, rest=0, widths=0, embedding=500, head=0, outside=0, hidden=1)
STEP = {
    "prompts": 2,
    "group_size": 3,
    "prompt_tokens": 10,
    "new_tokens": 5,
    "tail": 2,
    "trained": 1,
    "quantized": True,
    "unpacked": False,
    "sampling_passes": 1,
    "update_passes": 1,
    "again": False,
    "cache": 0,
}


def seconds(arm: str, card: PublishedCard, **changed: object) -> dict[str, float]:
    return step_seconds(card, SIZES, arm, **{**STEP, **changed})  # type: ignore[arg-type]


def test_what_has_to_be_computed() -> None:
    card = PublishedCard("all memory at once", 1, 1.0, math.inf)
    # Prompts once: 20 + 30 tokens through 4,000 weights, the head for 30.
    ours = seconds("midtune", card)
    assert ours["sampling"] == 2 * (4000 * 50 + 500 * 30)
    # Two blocks forward and backward, one of them with the gradient of its weights; the head there and back.
    assert ours["update"] == 2 * (50 * 1000 * 5 + 2 * 30 * 500)
    assert seconds("midtune", card, again=True)["update"] == 2 * (50 * 1000 * 7 + 2 * 30 * 500)
    # Prompts for each completion: 60 + 30 tokens, all blocks forward, again, and backward for both.
    whole = seconds("trl-full", card)
    assert whole["sampling"] == 2 * (4000 * 90 + 500 * 30)
    assert whole["update"] == 2 * (90 * 1000 * 16 + 30 * 500 * 4)
    assert seconds("trl-full-kept", card)["update"] == 2 * (90 * 1000 * 12 + 30 * 500 * 4)
    assert seconds("trl-qlora", card)["update"] == 2 * (90 * 1000 * 12 + 30 * 500 * 3)
    # All blocks forward, two of them backward, and one with the gradient of its weights.
    assert seconds("trl-block", card)["update"] == 2 * (90 * 1000 * 7 + 30 * 500 * 3)


def test_what_has_to_be_read() -> None:
    card = PublishedCard("computes at once", 1, math.inf, 1.0)
    packed = 500 + 15 + 0
    ours = seconds("midtune", card, cache=100)
    # Each of five tokens reads all blocks and the head in two bytes; half the cache is there in the mean.
    assert ours["sampling"] == 5 * (4 * packed + 2 * 500 + 50)
    assert seconds("midtune", card, unpacked=True)["sampling"] == 5 * (2 * 4000 + 2 * 500)
    assert seconds("midtune", card, sampling_passes=2)["sampling"] == 5 * 2 * (4 * packed + 2 * 500)
    assert ours["update"] == 2 * 2 * packed
    assert seconds("trl-qlora", card)["update"] == 3 * 4 * packed
