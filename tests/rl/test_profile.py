from __future__ import annotations

import torch

from midtune.rl.profile import BETWEEN, Profile, kind_of, product_flops


def test_operators_have_kinds() -> None:
    assert kind_of("aten::mm") == "matrix products"
    assert kind_of("mkldnn::_linear_pointwise") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("bitsandbytes::dequantize_4bit") == "unpacking weights"
    assert kind_of("aten::exp") == "other operators"


def test_time_goes_to_the_phase_it_is_spent_in() -> None:
    profile = Profile(torch.device("cpu"))
    matrix = torch.randn(400, 400)
    profile.start()
    with profile.phase("rollout"):
        for _ in range(20):
            matrix @ matrix
    with profile.phase("update"):
        matrix.exp()
    found = profile.stop()
    assert found["rollout"]["matrix products"] > 0
    assert "matrix products" not in found["update"]
    assert found["update"]["other operators"] > 0
    assert all(BETWEEN in seconds for seconds in found.values())


def test_floating_point_operations_by_hand() -> None:
    sizes = {"block": 10, "head": 100, "blocks": 4, "tail": 2}
    work = {"prompts": 2, "prompt_tokens": 5, "rows": 6, "new_tokens": 3}
    # 2 · 5 + 6 · 2 = 22 tokens pass the blocks; 2 + 6 · 2 = 14 are drawn, 18 scored.
    found = product_flops(sizes, work)
    assert found["rollout"] == 2 * (4 * 10 * 22 + 100 * 14)
    # Forward and backward through two blocks, one of them with a gradient of its own.
    assert found["update"] == 2 * (5 * 10 * 22 + 2 * 100 * 18)
