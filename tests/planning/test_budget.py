from dataclasses import replace

import pytest

from midtune.planning.budget import (
    Held,
    Sizes,
    Standing,
    block_phases,
    packed_bytes,
    peak,
    standing,
    unpacked_bytes,
)

# Ten blocks of 64 x 256 weights in linear layers and 100 others, an embedding of 1,000 and a head of as many.
SIZES = Sizes(
    blocks=10, linear=64 * 256, rest=100, widths=320, embedding=1000, head=1000, outside=10, hidden=8
)


def test_four_bits_a_weight_and_their_scales() -> None:
    # 16,384 weights: 8,192 bytes, 256 scales of a byte, and one of 4 bytes for those.
    assert packed_bytes(64 * 256) == 8192 + 256 + 4


def test_all_parameters_are_counted_once() -> None:
    assert SIZES.total == 10 * (16384 + 100) + 1000 + 1000 + 10


def stood(arm: str, sizes: Sizes = SIZES, **settings: object) -> Standing:
    asked = {
        "trained": 1,
        "quantized": True,
        "dtype_bytes": 2,
        "optimizer": "adamw",
        "reference": True,
        "on_card": True,
        "lora_rank": 16,
    }
    return standing(sizes, arm, **{**asked, **settings})  # type: ignore[arg-type]


def held(arm: str, sizes: Sizes = SIZES, **settings: object) -> dict[str, int]:
    found = stood(arm, sizes, **settings)
    return {**found.parts, "gradients": found.gradients, "step": found.step}


def test_what_midtune_holds() -> None:
    assert held("midtune") == {
        "frozen blocks": 10 * (8452 + 100 * 2),
        "embeddings and head": 2010 * 2,
        "trained blocks, fp32": 16484 * 4,
        "optimizer": 16484 * 8,
        "reference": 16484 * 4,
        "gradients": 16484 * 4,
        "step": 16484 * 4,
    }


def test_states_in_eight_bits_take_a_quarter_and_their_scales() -> None:
    lean = held("midtune", optimizer="adamw_8bit", reference=False)
    # Two moments of a byte, and 4 bytes for each 256 of both.
    assert lean["optimizer"] == round(16484 * (2 + 2 * 4 / 256))
    assert lean["step"] == 0 and "reference" not in lean


def test_an_embedding_on_the_host_is_not_held() -> None:
    assert held("midtune", host_embedding=True)["embeddings and head"] == 1010 * 2
    tied = replace(SIZES, head=0)
    assert held("midtune", tied, host_embedding=True)["embeddings and head"] == 1010 * 2
    assert held("midtune", tied)["embeddings and head"] == 1010 * 2


def test_gradients_in_bf16_take_half_until_the_optimizers_step() -> None:
    found = stood("midtune", reference=False, bf16_gradients=True)
    # One tensor, of half a block, is in fp32 at a time.
    assert found.accumulated == 16484 * 2 + 8192 * 4
    assert found.gradients == 16484 * 4


def test_full_training_holds_sixteen_bytes_a_parameter_and_a_second_model() -> None:
    found = held("trl-full")
    assert sum(found[part] for part in ("blocks", "embeddings and head", "optimizer", "gradients")) == (
        SIZES.total * 16
    )
    assert found["reference"] == SIZES.total * 4


def test_adapters_and_their_states_are_in_two_bytes() -> None:
    found = held("trl-qlora")
    adapters = 10 * 16 * 320
    assert (found["adapters"], found["optimizer"], found["gradients"]) == (
        adapters * 2,
        adapters * 4,
        adapters * 2,
    )
    # They are turned off for the reference.
    assert "reference" not in found


def test_unpacked_weights() -> None:
    linear = 10 * 16384
    assert unpacked_bytes(SIZES, quantized=True, dtype_bytes=2, laid_out=False) == linear * 2
    assert unpacked_bytes(SIZES, quantized=False, dtype_bytes=2, laid_out=False) == 0
    assert unpacked_bytes(SIZES, quantized=False, dtype_bytes=4, laid_out=True) == (linear + 1000) * 4


def test_phases_add_up() -> None:
    found = stood("midtune", reference=False, on_card=False)
    phases = block_phases(
        found,
        500,
        sampling=Held(1000, 1300, 1200),
        update=Held(7000, 9000, 6000),
        states=50,
        unpacked=200,
        on_card=False,
    )
    base = 500 + sum(found.parts.values())
    assert sum(phases["sampling"].values()) == base + 200 + 1300 + 50 + 600
    assert sum(phases["update"].values()) == base + found.gradients + 50 + 9000 + 3000
    # On a CPU tensors are stepped one by one; the largest of a block is taken to be half of it.
    assert sum(phases["optimizer"].values()) == base + found.gradients + 50 + 2 * (16384 // 2) * 4
    assert peak({"a": {"x": 1, "y": 2}, "b": {"x": 2}}) == ("a", 3)


@pytest.mark.parametrize("times", [0, 1, 17])
def test_held_grows_by_the_same_with_each_block(times: int) -> None:
    assert Held(10, 20, 5) + (Held(13, 25, 9) - Held(10, 20, 5)) * times == Held(
        10 + 3 * times, 20 + 5 * times, 5 + 4 * times
    )
