import torch
from transformers import PretrainedConfig

from midtune.planning.budget import Held, Loaded, Standing, packed_bytes, peak, step_phases, unpacked_bytes
from tests.planning.toy_sizes import SIZES

STANDING = Standing({"a": 30, "b": 4}, accumulated=60, gradients=70, step=9)
SAMPLING, UPDATE = Held(1000, 1300, 1200), Held(7000, 9000, 6000)


def test_four_bits_a_weight_and_their_scales() -> None:
    # 16,384 weights: 8,192 bytes, 256 scales of a byte, and one of 4 bytes for those.
    assert packed_bytes(64 * 256) == 8192 + 256 + 4


def test_unpacked_weights() -> None:
    linear = 10 * 16384

    def unpacked(dtype: torch.dtype, *, quantized: bool, on_card: bool) -> int:
        return unpacked_bytes(Loaded(PretrainedConfig(), dtype, quantized, on_card), SIZES)

    assert unpacked(torch.bfloat16, quantized=True, on_card=True) == linear * 2
    assert unpacked(torch.bfloat16, quantized=False, on_card=True) == 0
    assert unpacked(torch.float32, quantized=False, on_card=False) == (linear + 1000) * 4


def test_phases_of_midtune() -> None:
    found = step_phases(
        STANDING, 500, sampling=SAMPLING, update=UPDATE, on_card=False, states=400, unpacked=200
    )
    common = {"process": 500, "a": 30, "b": 4}
    assert found == {
        "sampling": {
            **common,
            "unpacked weights": 200,
            "keys and values": 1000,
            "boundary states": 400,
            # The states are put in place from a list of as many.
            "workspace": 400,
            "heap": 600,
        },
        "update": {
            **common,
            "gradients": 60,
            "boundary states": 400,
            "activations": 7000,
            "workspace": 2000,
            "heap": 3000,
        },
        "optimizer": {**common, "gradients": 70, "boundary states": 400, "workspace": 9},
    }


def test_phases_of_trl_have_no_states_and_a_card_no_heap() -> None:
    found = step_phases(STANDING, 500, sampling=SAMPLING, update=UPDATE, on_card=True)
    assert sum(found["sampling"].values()) == 534 + 1300
    assert sum(found["update"].values()) == 534 + 60 + 9000
    assert not {"unpacked weights", "boundary states"} & {name for parts in found.values() for name in parts}


def test_the_phase_that_holds_most() -> None:
    assert peak({"a": {"x": 1, "y": 2}, "b": {"x": 2}}) == ("a", 3)
