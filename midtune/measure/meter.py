"""Measure time and peak memory of each phase of a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from midtune.device import is_cuda
from midtune.measure.cards import Card, other_processes

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# Stands for time and memory outside every phase.
OUTSIDE = "outside"


class Meter:
    """Wall-clock seconds by phase, and peak memory overall and by phase.

    Every moment belongs to the innermost open phase: an outer phase gets neither the time nor the peak of an inner
    one. Peaks come from the process's only counter, which is reset at every boundary; so a meter leaves it alone until
    `reset_peak`, and two meters that reset it are both wrong. `clock` counts seconds from any origin; on CUDA it is
    read only after the device has finished.

    `peaks` are those of the step that `step` ended last: phase → `peak_bytes` held and, on CUDA, `reserved_bytes` the
    allocator took from the card. It is empty before `reset_peak`, and if the system cannot reset a peak.
    """

    def __init__(self, device: Any = "cpu", *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = str(device)
        self._cuda = is_cuda(self._device)
        self.clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._mark = self._began = 0.0
        self.peaks: dict[str, dict[str, int]] = {}
        self._step_peaks: dict[str, dict[str, int]] = {}
        self._by_phase, self._peak_bytes = False, 0

    @property
    def source(self) -> Literal["cuda_allocated", "resident"]:
        """What the bytes count: tensors on the CUDA device, or all physical memory of this process."""
        return "cuda_allocated" if self._cuda else "resident"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs inside to `name`, except inner phases."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def step(self) -> dict[str, float]:
        """Seconds of each phase since the last call; splits a phase that is still open."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        self.peaks, self._step_peaks = self._step_peaks, {}
        return seconds

    def begin_step(self) -> None:
        """Begin a step; drops what was charged before."""
        self.step()
        self._began = self.clock()

    def end_step(self) -> dict[str, float]:
        """Seconds of the step: `step`, `rollout` and `reward` as charged, and `update`, the rest."""
        charged = self.step()
        step = self.clock() - self._began
        rollout, reward = charged.get("rollout", 0.0), charged.get("reward", 0.0)
        return {"step": step, "rollout": rollout, "reward": reward, "update": step - rollout - reward}

    def reset_peak(self) -> bool:
        """Measure the peak from now on; False if the system cannot, and `peak_bytes` counts from process start."""
        self._peak_bytes, self._step_peaks = 0, {}
        self._by_phase = self._reset_counter() and bool(self._counted())
        return self._by_phase

    def peak_bytes(self) -> int:
        """Most bytes held since `reset_peak`, in any phase or outside."""
        counted = self._counted()
        return max(self._peak_bytes, counted["peak_bytes"] if counted else _process_peak_bytes())

    def current_bytes(self) -> int:
        """Bytes held now; the peak if the system does not say."""
        if self._cuda:
            import torch

            return int(torch.cuda.memory_allocated(self._device))
        return _status_bytes("VmRSS") or _process_peak_bytes()

    def _charge(self) -> None:
        """Charge time and peak since the last call to the innermost open phase."""
        if self._cuda:
            import torch

            torch.cuda.synchronize(self._device)
        now = self.clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now
        if not self._by_phase:
            return
        counted = self._counted()
        self._peak_bytes = max(self._peak_bytes, counted.get("peak_bytes", 0))
        peaks = self._step_peaks.setdefault(self._open[-1] if self._open else OUTSIDE, {})
        peaks |= {kind: max(count, peaks.get(kind, 0)) for kind, count in counted.items()}
        if not self._reset_counter():
            self._by_phase, self._step_peaks = False, {}

    def _counted(self) -> dict[str, int]:
        """Peaks since the counter was reset; empty without such a counter."""
        if self._cuda:
            import torch

            return {
                "peak_bytes": int(torch.cuda.max_memory_allocated(self._device)),
                "reserved_bytes": int(torch.cuda.max_memory_reserved(self._device)),
            }
        peak = _status_bytes("VmHWM")
        return {} if peak is None else {"peak_bytes": peak}

    def _reset_counter(self) -> bool:
        """Reset the peak to the bytes held now; False if the system cannot."""
        if self._cuda:
            import torch

            # The counters cannot be read before CUDA has started.
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            # 5 resets VmHWM, the peak, to the memory resident now (Linux; man 5 proc).
            CLEAR_REFS.write_text("5")
        except OSError:
            return False
        return True


def card_of(device: Any) -> Card:
    """The card behind a torch device or its number."""
    import torch

    card = torch.cuda.get_device_properties(device)
    others = other_processes(str(card.uuid), torch.cuda.memory_reserved(device))
    return Card(card.name, *torch.cuda.mem_get_info(device), others)


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
