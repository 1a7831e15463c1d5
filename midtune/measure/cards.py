"""What NVIDIA's management library says about the cards of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class CardProcess(NamedTuple):
    """A process that computes on a card; `held_bytes` is None where the driver does not say."""

    pid: int
    name: str
    held_bytes: int | None


class Card(NamedTuple):
    """A card that torch can use; `others` is what else computes on it, the largest first."""

    name: str
    uuid: str
    free_bytes: int
    total_bytes: int
    others: list[CardProcess]

    @property
    def tight(self) -> bool:
        """Whether less than half of the memory is free, which is much before anything is loaded."""
        return self.free_bytes < self.total_bytes / 2


def card_names() -> list[str]:
    """The machine's NVIDIA cards, whether or not torch can use them."""
    return _answer(
        lambda nvml: [
            nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(nvml.nvmlDeviceGetCount())
        ]
    )


def other_processes(uuid: str) -> list[CardProcess]:
    """What else computes on a card, the largest first.

    Args:
        uuid: the card's, as torch has it; their numbers differ where CUDA_VISIBLE_DEVICES is set.
    """
    found = _answer(
        lambda nvml: nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    )
    others = [
        CardProcess(process.pid, _name(process.pid), process.usedGpuMemory)
        for process in found
        if process.pid != os.getpid()
    ]
    return sorted(others, key=lambda process: -(process.held_bytes or 0))


def _answer(ask: Callable[[Any], list[T]]) -> list[T]:
    """What the library answers; nothing where it or its driver is not there, or does not know."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return ask(pynvml)
    except pynvml.NVMLError:
        return []


def _name(pid: int) -> str:
    """A process's name; from within a container, those outside it have none."""
    import psutil

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "process"
