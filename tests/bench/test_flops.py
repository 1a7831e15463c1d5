from dataclasses import replace
from typing import Any

import pytest

from midtune.bench.flops import Batch, rollout_flops, update_flops
from midtune.model.sizes import Sizes

SIZES = Sizes(blocks=4, linear=1000, rest=7, widths=0, embedding=500, head=0, outside=0, hidden=1)
# 6 completions of 5 tokens for prompts of 10.
BATCH = Batch(prompts=2, group_size=3, prompt_tokens=10, new_tokens=5)


def update(arm: str, **settings: Any) -> float:
    return update_flops(SIZES, BATCH, arm, tail=2, trained=1, **settings)


def test_sampling() -> None:
    # Prompts once and four tokens fed back: 20 + 24 pass the blocks; 2 + 24 are drawn.
    assert rollout_flops(SIZES, BATCH, "midtune") == 2 * (4000 * 44 + 500 * 26)
    # Prompts for each completion: 60 + 24 pass, 6 + 24 are drawn.
    assert rollout_flops(SIZES, BATCH, "trl-full") == 2 * (4000 * 84 + 500 * 30)


def test_an_update_of_midtune() -> None:
    # Two blocks forward and backward, one of them with the gradient of its weights; the head there and back.
    assert update("midtune") == 2 * (44 * 1000 * 5 + 30 * 500 * 2)
    assert update("midtune", recompute=True) == 2 * (44 * 1000 * 7 + 30 * 500 * 2)
    assert update("midtune", reference=True) == 2 * (44 * 1000 * 7 + 30 * 500 * 3)
    # A check of 30 tokens takes them all. Of 6 completions of 500 tokens it takes two each: 3 is a third too many.
    assert update("midtune", checked=True) == 2 * (44 * 1000 * 7 + 30 * 500 * 3)
    long = replace(BATCH, new_tokens=500)
    plain, checked = (
        update_flops(SIZES, long, "midtune", tail=2, trained=1, checked=checked) for checked in (False, True)
    )
    assert checked - plain == 2 * ((20 + 4 * 499) * 1000 * 2 + 4 * 500 * 500)


def test_slower_updates_of_midtune() -> None:
    # Prompts for each completion; through the whole model, the two blocks below too, there alone.
    assert update("midtune", kind="rows") == 2 * (84 * 1000 * 5 + 30 * 500 * 2)
    assert update("midtune", kind="whole") == 2 * (84 * 1000 * 7 + 30 * 500 * 2)
    assert update("midtune", kind="whole", checked=True) == 2 * (84 * 1000 * 11 + 30 * 500 * 3)
    assert update("midtune", kind="whole", recompute=True) == 2 * (84 * 1000 * 9 + 30 * 500 * 2)


@pytest.mark.parametrize(
    ("arm", "blocks", "head"),
    [
        # All blocks forward, again, and backward for both gradients.
        ("trl-full", 4 * 4, 4),
        ("trl-full-kept", 4 * 3, 4),
        ("trl-qlora", 4 * 3, 3),
        ("trl-qlora-fp32", 4 * 3, 3),
        # All blocks forward, two of them backward, and one with the gradient of its weights.
        ("trl-block", 4 + 2 + 1, 3),
    ],
)
def test_an_update_of_trl(arm: str, blocks: int, head: int) -> None:
    assert update(arm) == 2 * (90 * 1000 * blocks + 30 * 500 * head)
    assert update(arm, reference=True) == 2 * (90 * 1000 * (blocks + 4) + 30 * 500 * (head + 1))


def test_training_everything_from_block_0_with_prompts_alone_is_full_training() -> None:
    single = Batch(prompts=6, group_size=1, prompt_tokens=10, new_tokens=5)
    ours = update_flops(SIZES, single, "midtune", tail=4, trained=4)
    full = update_flops(SIZES, single, "trl-full-kept", tail=4, trained=4)
    # Six last tokens through four blocks, three times; the head again, and the gradient of its weights.
    assert full - ours == 2 * (6 * 4000 * 3 + 30 * 500 * 2)


def test_against_a_measured_update_of_smollm2() -> None:
    """SmolLM2-135M, block 15, two cores, fp32: updates measured at 3.06 s (block) and 17.7 s (full, kept)."""
    smollm = Sizes(
        blocks=30,
        linear=9 * 576 * 64 * 2 + 3 * 64 * 576 * 2 + 3 * 576 * 1536,
        rest=2 * 576,
        widths=0,
        embedding=49152 * 576,
        head=0,
        outside=576,
        hidden=576,
    )
    assert smollm.total == 134_515_008
    batch = Batch(prompts=4, group_size=8, prompt_tokens=46, new_tokens=24)
    ratio = update_flops(smollm, batch, "trl-full-kept", tail=15, trained=1) / update_flops(
        smollm, batch, "midtune", tail=15, trained=1
    )
    assert 0.8 * 17.7 < 3.06 * ratio < 17.7
