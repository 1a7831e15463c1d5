from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from midtune.config import RunConfig
from midtune.errors import RunStopped
from midtune.model.memory import RowLimit
from midtune.report.terminal import Terminal
from midtune.stages import setup

GIB = 2**30


def opened(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, free: int) -> Any:
    """A policy on a card of 24 GiB that another process uses too."""
    monkeypatch.setattr(setup, "resolve_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GIB))
    card = SimpleNamespace(name="NVIDIA L4", uuid="0-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    policy = SimpleNamespace(sampling_rows=RowLimit("sampling", "lower --group-size"))
    monkeypatch.setattr(setup, "load_policy", lambda *_, **__: policy)
    source: Any = SimpleNamespace(name="toy")
    return setup.open_policy(RunConfig(), source, terminal)


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library lists this process and ollama."""
    found = [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in ((os.getpid(), 1), (7, 18 * GIB))]
    library = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-0-1": 0}.__getitem__,
        nvmlDeviceGetComputeRunningProcesses=lambda card: found,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(name=lambda: "ollama"))


def short(groups: int) -> None:
    raise torch.OutOfMemoryError


@pytest.mark.usefixtures("ollama")
def test_a_tight_card_is_shown_with_what_else_uses_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(terminal, monkeypatch, 5 * GIB)
    assert (
        "memory is tight: NVIDIA L4, 5.00 GiB of 24.00 GiB free; also in use by ollama (7) 18.00 GiB.\n"
        in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    )


@pytest.mark.usefixtures("ollama")
def test_what_else_uses_a_card_is_said_when_its_memory_runs_out(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = opened(terminal, monkeypatch, 12 * GIB)
    assert "ollama" not in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(RunStopped, match=r"The card is also in use by ollama \(7\) 18\.00 GiB\.$"):
        policy.sampling_rows.fitting(2, 1, short)
    assert "at most 1 go together. The card is also in use by" in terminal.console.file.getvalue()  # type: ignore[attr-defined]


def test_without_nvidias_library_only_what_is_free_is_known(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    policy = opened(terminal, monkeypatch, 5 * GIB)
    assert "5.00 GiB of 24.00 GiB free.\n" in terminal.console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(RunStopped, match=r"lower --group-size\.$"):
        policy.sampling_rows.fitting(1, 1, short)
