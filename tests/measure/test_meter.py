import mmap
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midtune.measure import meter as meter_room
from midtune.measure.cards import card_names
from midtune.measure.meter import OUTSIDE, Meter, card_of


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


def test_the_phases_of_a_step_add_up_to_it(clock: Clock) -> None:
    meter = Meter(clock=clock)
    with meter.phase("rollout"):
        clock.now += 9
    meter.begin_step()
    with meter.phase("rollout"):
        clock.now += 3
        with meter.phase("reward"):
            clock.now += 2
    clock.now += 1.5
    assert meter.end_step() == {"step": 6.5, "rollout": 3.0, "reward": 2.0, "update": 1.5}
    meter.begin_step()
    clock.now += 1
    assert meter.end_step() == {"step": 1.0, "rollout": 0.0, "reward": 0.0, "update": 1.0}


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


class Kernel:
    """A process's memory as Linux counts it; `reads` and `writes` count how often it was asked and reset."""

    def __init__(self) -> None:
        self.held = self.peak = 100 * 1024
        self.reads = self.writes = 0
        self.locked = False

    def hold(self, kib: int) -> None:
        self.held = kib * 1024
        self.peak = max(self.peak, self.held)

    def read_text(self) -> str:
        self.reads += 1
        return f"VmHWM:\t{self.peak // 1024} kB\nVmRSS:\t{self.held // 1024} kB\n"

    def write_text(self, text: str) -> None:
        assert text == "5"
        if self.locked:
            raise PermissionError
        self.writes += 1
        self.peak = self.held


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(meter_room, "STATUS", fake)
    monkeypatch.setattr(meter_room, "CLEAR_REFS", fake)
    return fake


def peaks_in_kib(meter: Meter) -> dict[str, float]:
    return {name: peaks["peak_bytes"] / 1024 for name, peaks in meter.peaks.items()}


def test_each_phase_has_the_peak_of_its_own_moments(kernel: Kernel) -> None:
    meter = Meter()
    assert meter.reset_peak()
    kernel.hold(900)
    kernel.hold(200)
    meter.step()
    with meter.phase("rollout"):
        kernel.hold(500)
        with meter.phase("reward"):
            kernel.hold(700)
            kernel.hold(300)
        kernel.hold(400)
    kernel.hold(600)
    kernel.hold(250)
    with meter.phase("rollout"):
        pass
    meter.step()
    # The reward begins with the 500 KiB of the rollout, which has 400 in its second part.
    assert peaks_in_kib(meter) == {OUTSIDE: 600, "rollout": 500, "reward": 700}
    assert meter.peak_bytes() == 900 * 1024
    meter.step()
    assert peaks_in_kib(meter) == {OUTSIDE: 250}
    assert meter.reset_peak()
    assert meter.peak_bytes() == 250 * 1024


def test_what_is_held_since_the_last_boundary_counts_for_the_peak(kernel: Kernel) -> None:
    meter = Meter()
    meter.reset_peak()
    with meter.phase("rollout"):
        kernel.hold(800)
        assert meter.peak_bytes() == 800 * 1024


def test_a_boundary_reads_and_resets_the_counter_once(kernel: Kernel) -> None:
    meter = Meter()
    with meter.phase("rollout"):
        pass
    assert meter.step() and meter.peaks == {}
    assert (kernel.reads, kernel.writes) == (0, 0)
    meter.reset_peak()
    kernel.reads = kernel.writes = 0
    with meter.phase("rollout"), meter.phase("reward"):
        pass
    meter.step()
    assert (kernel.reads, kernel.writes) == (5, 5)


def test_where_the_counter_cannot_be_reset_no_phase_has_a_peak(kernel: Kernel) -> None:
    meter = Meter()
    kernel.locked = True
    assert meter.reset_peak() is False
    with meter.phase("rollout"):
        kernel.hold(500)
    meter.step()
    assert meter.peaks == {}
    assert meter.peak_bytes() == 500 * 1024


def test_when_the_counter_can_be_reset_no_more_the_peak_stays_right(kernel: Kernel) -> None:
    meter = Meter()
    meter.reset_peak()
    with meter.phase("rollout"):
        kernel.hold(500)
        kernel.locked = True
    kernel.hold(400)
    meter.step()
    assert meter.peaks == {}
    assert meter.peak_bytes() == 500 * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peaks_of_phases_on_linux() -> None:
    meter = Meter()
    if not meter.reset_peak():
        pytest.skip("this kernel does not reset the peak")
    base = meter.current_bytes()
    for name, mib in (("rollout", 64), ("update", 16)):
        with meter.phase(name), mmap.mmap(-1, mib * 2**20) as pages:
            pages[:: mmap.PAGESIZE] = bytes(mib * 2**20 // mmap.PAGESIZE)
    meter.step()
    above = {name: (peaks["peak_bytes"] - base) / 2**20 for name, peaks in meter.peaks.items()}
    assert 56 < above["rollout"] < 80
    assert 8 < above["update"] < 32
    assert 56 < (meter.peak_bytes() - base) / 2**20 < 80


class Card:
    """What torch counts on a card; `calls` are the names of the functions that were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held = self.peak = self.reserved = self.reserved_peak = 0

    def hold(self, held: int, reserved: int) -> None:
        self.held, self.reserved = held, reserved
        self.peak, self.reserved_peak = max(self.peak, held), max(self.reserved_peak, reserved)

    def reset(self) -> None:
        self.peak, self.reserved_peak = self.held, self.reserved


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    torch = pytest.importorskip("torch")
    fake = Card()
    for name, function in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": fake.reset,
        "max_memory_allocated": lambda: fake.peak,
        "max_memory_reserved": lambda: fake.reserved_peak,
        "memory_allocated": lambda: fake.held,
    }.items():

        def call(device: str, name: str = name, function: Callable[[], Any] = function) -> Any:
            assert device == "cuda:1"
            fake.calls.append(name)
            return function()

        monkeypatch.setattr(torch.cuda, name, call)
    monkeypatch.setattr(torch.cuda, "init", lambda: fake.calls.append("init"))
    return fake


def test_cuda_figures_come_from_torch(card: Card, clock: Clock) -> None:
    torch = pytest.importorskip("torch")
    meter = Meter(torch.device("cuda:1"), clock=clock)
    assert meter.source == "cuda_allocated"
    assert meter.peak_bytes() == 0
    card.calls.clear()
    with meter.phase("rollout"):
        clock.now += 1
    assert card.calls == ["synchronize"] * 2

    card.hold(99, 200)
    card.hold(5, 50)
    assert meter.reset_peak() is True
    meter.step()
    card.calls.clear()
    with meter.phase("rollout"):
        card.hold(7, 60)
        card.hold(6, 60)
    boundary = [
        "synchronize",
        "max_memory_allocated",
        "max_memory_reserved",
        "init",
        "reset_peak_memory_stats",
    ]
    assert card.calls == boundary * 2
    card.hold(8, 40)
    meter.step()
    assert meter.peaks == {
        "rollout": {"peak_bytes": 7, "reserved_bytes": 60},
        OUTSIDE: {"peak_bytes": 8, "reserved_bytes": 60},
    }
    assert (meter.peak_bytes(), meter.current_bytes()) == (8, 8)


@pytest.mark.gpu
def test_peaks_of_phases_on_a_card() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    meter = Meter("cuda:0")
    assert meter.reset_peak()
    base = meter.current_bytes()
    for name, mib in (("rollout", 64), ("update", 16)):
        with meter.phase(name):
            torch.empty(mib * 2**20, dtype=torch.uint8, device="cuda:0")
    meter.step()
    found = {name: meter.peaks[name]["peak_bytes"] - base for name in ("rollout", "update")}
    assert found == {"rollout": 64 * 2**20, "update": 16 * 2**20}
    assert meter.peaks["update"]["reserved_bytes"] >= meter.peaks["update"]["peak_bytes"]
    assert meter.peak_bytes() - base == 64 * 2**20


@pytest.mark.gpu
def test_a_peak_is_reset_before_anything_else_is_done_on_a_card() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    code = "from midtune.measure.meter import Meter; assert Meter('cuda:0').reset_peak()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_card_of_this_machine() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    held = torch.empty(2**20, device="cuda:0")
    card = card_of(held.device)
    assert card.name in card_names()
    assert 0 < card.free_bytes < card.total_bytes
    assert os.getpid() not in [process.pid for process in card.others]


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
