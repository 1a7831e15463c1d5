"""Measured time of each phase of a step, and measured peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Meter:
    """Wall-clock seconds by phase, and the most memory held.

    Args:
        device: a torch device or its name; on CUDA the clock is read only after the device has finished.
        clock: seconds from any origin.
    """

    def __init__(self, device: Any = "cpu", *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = str(device)
        self._cuda = self._device.startswith("cuda")
        self._clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._mark = 0.0

    @property
    def source(self) -> Literal["cuda_allocated", "resident"]:
        """What the bytes count: tensors on the CUDA device, or all physical memory of this process."""
        return "cuda_allocated" if self._cuda else "resident"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`; an inner phase's time is not counted for the outer one."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def step(self) -> dict[str, float]:
        """Seconds of each phase since the last call; a phase still open is split here."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def reset_peak(self) -> bool:
        """Measure the peak from now on.

        Returns:
            False where the system cannot do that, so that `peak_bytes` counts from the process's start.
        """
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            # 5 sets VmHWM, the peak, back to what is resident now (Linux; man 5 proc).
            CLEAR_REFS.write_text("5")
        except OSError:
            return False
        return True

    def peak_bytes(self) -> int:
        """The most bytes held since `reset_peak`."""
        if self._cuda:
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        peak = _status_bytes("VmHWM")
        return peak if peak is not None else _process_peak_bytes()

    def current_bytes(self) -> int:
        """Bytes held now; where the system does not say, the peak."""
        if self._cuda:
            import torch

            return int(torch.cuda.memory_allocated(self._device))
        now = _status_bytes("VmRSS")
        return now if now is not None else _process_peak_bytes()

    def _charge(self) -> None:
        """Give the time since the last mark to the innermost open phase."""
        if self._cuda:
            import torch

            torch.cuda.synchronize(self._device)
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def free_bytes(device: Any) -> int:
    """Bytes that can still be allocated on a torch device, or on the one of this name."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _status_bytes(key: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _process_peak_bytes() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
