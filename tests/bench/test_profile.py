from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from midtune.bench.profile import BETWEEN, BenchMeter, Operators, Profile, kind_of, seconds_by_kind


def test_operators_have_kinds() -> None:
    assert kind_of("aten::mm") == "matrix products"
    assert kind_of("mkldnn::_linear_pointwise") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("bitsandbytes::dequantize_4bit") == "unpacking weights"
    assert kind_of("aten::exp") == "other operators"


@contextmanager
def profiled_step(device: str) -> Iterator[tuple[BenchMeter, Profile]]:
    """The second of two steps, of which nothing but the last is profiled."""
    meter = BenchMeter(torch.device(device))
    profile = Profile(meter, torch.device(device), last=2)
    profile.on_step_begin(None, SimpleNamespace(global_step=0))
    profile.on_step_end(None, SimpleNamespace(global_step=1))
    assert profile.found == {}
    profile.on_step_begin(None, SimpleNamespace(global_step=1))
    yield meter, profile
    profile.on_step_end(None, SimpleNamespace(global_step=2))


def test_time_goes_to_the_phase_it_is_spent_in() -> None:
    matrix = torch.randn(400, 400)
    with profiled_step("cpu") as (meter, profile):
        with meter.phase("rollout"):
            for _ in range(20):
                matrix @ matrix
        matrix.exp()
    found = profile.found
    assert profile.peak > 0
    assert found["rollout"]["matrix products"] > 0
    assert "matrix products" not in found["update"]
    assert found["update"]["other operators"] > 0
    assert all(BETWEEN in seconds for seconds in found.values())


def event(name: str, start: int, end: int, device: str = "CPU", on_card: int = 0) -> Any:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name,
        time_range=span,
        device_type=SimpleNamespace(name=device),
        self_device_time_total=on_card,
        self_cpu_time_total=end - start,
    )


def test_a_kernel_counts_once_and_the_card_idles_the_rest() -> None:
    # What torch's profiler gives of a card: operators with the time of the kernels they launched, the kernels
    # themselves, and the phases on both time lines.
    events = [
        event("rollout", 0, 1000),
        event("aten::mm", 10, 20, on_card=300),
        event("ampere_bf16_s16816gemm", 15, 315, "CUDA", on_card=300),
        event("aten::exp", 30, 35, on_card=100),
        event("vectorized_elementwise_kernel", 315, 415, "CUDA", on_card=100),
        event("rollout", 15, 415, "CUDA", on_card=400),
    ]
    assert seconds_by_kind(events, ["rollout"], on_card=True) == {
        "rollout": {
            "matrix products": pytest.approx(300e-6),
            "other operators": pytest.approx(100e-6),
            BETWEEN: pytest.approx(600e-6),
        }
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cards_profile_is_no_longer_than_the_phase() -> None:
    matrix = torch.randn(2048, 2048, device="cuda")
    with profiled_step("cuda") as (meter, profile), meter.phase("rollout"):
        for _ in range(50):
            matrix @ matrix
    seconds = profile.found["rollout"]
    assert seconds["matrix products"] > 0.5 * sum(seconds.values())


def test_operators_of_a_block_are_counted_and_views_are_not() -> None:
    class Toy(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = (hidden * 2).view(-1).view(hidden.shape)
            return doubled + 1

    toy = Toy()
    operators = Operators(toy)
    # Of three passes, two are of one token a row.
    counted = operators.per_pass(lambda: [toy(torch.ones(2, tokens, 3)) + 5 for tokens in (4, 1, 1)])
    assert (counted, operators.passes) == (2.0, 2)
