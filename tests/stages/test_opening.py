"""What is opened says what else uses the card, when it is opened and when its memory runs out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from midtune.config import load_config
from midtune.errors import RunStopped
from midtune.report.terminal import Terminal
from midtune.rollout.sampling import Sampler
from midtune.stages import opening
from midtune.stages.opening import Opened

GIB = 2**30


def opened(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, free: int) -> Sampler:
    """A sampler of the bundled model as on a card of 24 GiB; it is on the CPU."""
    monkeypatch.setattr(opening, "resolve_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GIB))
    card = SimpleNamespace(name="NVIDIA L4", uuid="0-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = Opened(load_config(None, {"model.device": "cpu"}), terminal)
    return found.sampler(found.policy())


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """NVIDIA's library lists this process and one that sleeps, of which this is the number."""
    with subprocess.Popen(["sleep", "60"]) as process:
        pids = (os.getpid(), 1), (process.pid, 18 * GIB)
        library = SimpleNamespace(
            NVMLError=OSError,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID={"GPU-0-1": 0}.__getitem__,
            nvmlDeviceGetComputeRunningProcesses=lambda card: [
                SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in pids
            ],
        )
        monkeypatch.setitem(sys.modules, "pynvml", library)
        yield process.pid
        process.kill()


def short(groups: int) -> None:
    raise torch.OutOfMemoryError


def test_a_tight_card_is_shown_with_what_else_uses_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, sleeping: int
) -> None:
    opened(terminal, monkeypatch, 5 * GIB)
    assert (
        f"memory is tight: NVIDIA L4, 5.00 GiB of 24.00 GiB free; also in use by sleep ({sleeping}) 18.00 GiB.\n"
        in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    )


def test_what_else_uses_a_card_is_said_when_its_memory_runs_out(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, sleeping: int
) -> None:
    sampler = opened(terminal, monkeypatch, 12 * GIB)
    assert "sleep" not in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    used = rf"The card is also in use by sleep \({sleeping}\) 18\.00 GiB\.$"
    with pytest.raises(RunStopped, match=used):
        sampler.limits.rows.fitting(2, 1, short)
    assert "at most 1 go together. The card is also in use by" in terminal.console.file.getvalue()  # type: ignore[attr-defined]


def test_without_nvidias_library_only_what_is_free_is_known(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = opened(terminal, monkeypatch, 5 * GIB)
    assert "5.00 GiB of 24.00 GiB free.\n" in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(RunStopped, match=r"model\.unpack=never\.$"):
        sampler.limits.rows.fitting(1, 1, short)
