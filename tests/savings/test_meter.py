import mmap
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from midtune.savings import meter as meter_room
from midtune.savings.meter import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nested_phases_are_not_counted_twice(clock: Clock) -> None:
    meter = Meter(clock=clock)
    clock.now += 50
    with meter.phase("rollout"):
        clock.now += 3
        with meter.phase("reward"):
            clock.now += 2
        clock.now += 1
    clock.now += 10
    with meter.phase("update"):
        clock.now += 4
    with meter.phase("rollout"):
        clock.now += 0.5
    assert meter.step() == {"rollout": 4.5, "reward": 2.0, "update": 4.0}
    assert meter.step() == {}


def test_a_phase_open_at_the_end_of_a_step_is_split(clock: Clock) -> None:
    meter = Meter(clock=clock)
    with meter.phase("update"):
        clock.now += 1
        assert meter.step() == {"update": 1.0}
        clock.now += 2
    assert meter.step() == {"update": 2.0}


def test_an_error_closes_the_phase(clock: Clock) -> None:
    meter = Meter(clock=clock)
    with pytest.raises(ValueError), meter.phase("outer"), meter.phase("inner"):
        clock.now += 1
        raise ValueError
    clock.now += 5
    assert meter.step() == {"outer": 0.0, "inner": 1.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_on_linux_starts_anew() -> None:
    meter = Meter("cpu")
    assert meter.source == "resident"
    # Mapped anew: what is allocated otherwise may lie in memory that the process has kept.
    pages = mmap.mmap(-1, 64 * 2**20)
    if not meter.reset_peak():
        pytest.skip("this kernel does not reset the peak")
    base = meter.peak_bytes()
    np.frombuffer(pages, dtype=np.uint8)[:] = 1
    assert 60 * 2**20 < meter.peak_bytes() - base < 80 * 2**20
    pages.close()
    assert meter.peak_bytes() - base > 60 * 2**20
    assert meter.current_bytes() < base + 30 * 2**20
    assert meter.reset_peak()
    assert meter.peak_bytes() < base + 30 * 2**20


def test_without_proc_the_peak_counts_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_room, "STATUS", tmp_path / "none" / "status")
    monkeypatch.setattr(meter_room, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    meter = Meter("cpu")
    assert meter.reset_peak() is False
    assert meter.peak_bytes() > 10 * 2**20
    assert meter.current_bytes() == meter.peak_bytes()


def test_cuda_figures_come_from_torch(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    torch = pytest.importorskip("torch")
    calls: list[tuple[str, str]] = []
    for name, result in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 7,
        "memory_allocated": 5,
    }.items():
        monkeypatch.setattr(
            torch.cuda,
            name,
            lambda device, name=name, result=result: (calls.append((name, device)), result)[1],
        )
    meter = Meter(torch.device("cuda:1"), clock=clock)
    with meter.phase("rollout"):
        clock.now += 1
    assert calls == [("synchronize", "cuda:1")] * 2
    assert meter.reset_peak() is True
    assert (meter.peak_bytes(), meter.current_bytes(), meter.source) == (7, 5, "cuda_allocated")


def test_metering_holds_no_memory_over_steps(clock: Clock) -> None:
    meter = Meter(clock=clock)
    tracemalloc.start()
    for _ in range(2000):
        with meter.phase("rollout"):
            pass
        meter.step()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20_000
