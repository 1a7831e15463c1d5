"""Where the time of a step goes, by kind of work, beside what matrix products alone would need."""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# Kind of work → what the names of its operators contain; the first that fits counts.
KINDS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::matmul", "::_linear_pointwise", "gemm"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "unpacking weights": ("dequantize", "_reorder_linear_weight"),
}
OTHER, BETWEEN = "other operators", "between operators"


def kind_of(operator: str) -> str:
    """The kind of work that an operator such as `aten::mm` does."""
    return next((kind for kind, names in KINDS.items() if any(name in operator for name in names)), OTHER)


class Profile:
    """Seconds by phase and kind of one step; time in which no operator runs counts as `between operators`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities)
        self._phases: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give what runs inside to the phase `name`; phases do not overlap."""
        self._phases.append(name)
        with record_function(name):
            yield
            if self._cuda:
                # What was launched inside belongs to the phase, whenever the card comes to it.
                torch.cuda.synchronize()

    def start(self) -> None:
        """Begin to watch."""
        self._profiler.start()

    def stop(self) -> dict[str, dict[str, float]]:
        """End, and return seconds by phase and kind of work."""
        self._profiler.stop()
        return seconds_by_kind(self._profiler.events(), self._phases, on_card=self._cuda)


def seconds_by_kind(
    events: Iterable[Any], phases: Sequence[str], *, on_card: bool
) -> dict[str, dict[str, float]]:
    """Seconds by phase and kind of work.

    Args:
        events: the profiler's. On a card each kernel is there twice: as an event of its own, and in the device time
            of the operator that launched it, which is what counts.
        phases: names of the events that stand for phases.
    """
    events = [event for event in events if event.device_type.name == "CPU"]
    found: dict[str, dict[str, float]] = {}
    for name in phases:
        whole = next(event for event in events if event.name == name)
        own: dict[str, float] = {}
        for event in events:
            inside = whole.time_range.start <= event.time_range.start <= whole.time_range.end
            if event is whole or not inside or event.name in phases:
                continue
            microseconds = event.self_device_time_total if on_card else event.self_cpu_time_total
            own[kind_of(event.name)] = own.get(kind_of(event.name), 0.0) + microseconds / 1e6
        seconds = whole.time_range.elapsed_us() / 1e6
        own[BETWEEN] = max(0.0, seconds - sum(own.values()))
        found[name] = own
    return found


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the best of ten products of square matrices."""
    # A card does smaller ones before it is at full speed.
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * size**3 / min(timeit.repeat(product, number=1, repeat=10))
