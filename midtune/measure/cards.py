"""Query NVIDIA's management library about this machine's cards."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class CardProcess(NamedTuple):
    """A process that computes on a card; `held_bytes` is None if the driver does not say."""

    pid: int
    name: str
    held_bytes: int | None


class Card(NamedTuple):
    """A card that torch can use; `others` are the other processes on it, largest first."""

    name: str
    free_bytes: int
    total_bytes: int
    others: list[CardProcess]

    @property
    def tight(self) -> bool:
        """Whether less than half of the memory is free, which is little before anything is loaded."""
        return self.free_bytes < self.total_bytes / 2


def card_names() -> list[str]:
    """Names of the machine's NVIDIA cards, whether or not torch can use them."""
    return _each("nvmlDeviceGetName")


def card_bytes() -> list[int]:
    """Total memory of each of them, in bytes."""
    return [memory.total for memory in _each("nvmlDeviceGetMemoryInfo")]


def _each(question: str) -> list[Any]:
    return _answer(
        lambda nvml: [
            getattr(nvml, question)(nvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(nvml.nvmlDeviceGetCount())
        ]
    )


def other_processes(uuid: str, own_bytes: int) -> list[CardProcess]:
    """Other processes that compute on a card, largest first; this one holds `own_bytes` of it.

    The uuid is torch's: card numbers differ if CUDA_VISIBLE_DEVICES is set.
    """
    found = _answer(
        lambda nvml: nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    )
    # In a container the driver gives the host's numbers: the process that holds most nearly as much is this one.
    own = min(
        found, key=lambda p: (p.pid != os.getpid(), abs((p.usedGpuMemory or 0) - own_bytes)), default=None
    )
    others = [CardProcess(p.pid, _name(p.pid), p.usedGpuMemory) for p in found if p is not own]
    return sorted(others, key=lambda process: -(process.held_bytes or 0))


def _answer(ask: Callable[[Any], list[T]]) -> list[T]:
    """Ask the library; empty if it or its driver is missing, or does not know."""
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
    """A process's name; `process` for one outside this container."""
    import psutil

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "process"
