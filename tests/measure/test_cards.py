from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from midtune.measure.cards import CardProcess, card_names, other_processes


class NVMLError(Exception):
    pass


def failing(*_: Any) -> Any:
    raise NVMLError("driver not loaded")


def process(pid: int, held_bytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=held_bytes)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts a library in place of NVIDIA's: two cards, and what is given."""

    def put(**functions: Any) -> None:
        cards = {"GPU-0-1": 0, "GPU-2-3": 1}
        fake = {
            "NVMLError": NVMLError,
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": cards.__getitem__,
            "nvmlDeviceGetName": ("NVIDIA L4", "NVIDIA A10G").__getitem__,
            **functions,
        }
        monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**fake))

    return put


def test_cards_are_named_in_their_order(library: Callable[..., None]) -> None:
    library()
    assert card_names() == ["NVIDIA L4", "NVIDIA A10G"]


def test_other_processes_are_those_on_the_card_but_for_this_one(
    library: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {7: "python3", 8: "ollama", 9: "Xorg"}

    def named(pid: int) -> SimpleNamespace:
        if pid not in names:
            raise psutil.NoSuchProcess(pid)
        return SimpleNamespace(name=lambda: names[pid])

    monkeypatch.setattr(psutil, "Process", named)
    found = [process(9, None), process(7, 2**30), process(os.getpid(), 2**31), process(8, 2**32)]
    on_cards = {0: [], 1: [*found, process(10**6, 5)]}
    library(nvmlDeviceGetComputeRunningProcesses=on_cards.__getitem__)
    assert other_processes("2-3", 2**31) == [
        CardProcess(8, "ollama", 2**32),
        CardProcess(7, "python3", 2**30),
        CardProcess(10**6, "process", 5),
        CardProcess(9, "Xorg", None),
    ]
    assert other_processes("0-1", 0) == []


def test_in_a_container_this_one_is_what_holds_as_much(library: Callable[..., None]) -> None:
    on_cards = {0: [], 1: [process(10**6, 2**30 + 5), process(10**6 + 1, 2**32)]}
    library(nvmlDeviceGetComputeRunningProcesses=on_cards.__getitem__)
    assert other_processes("2-3", 2**30) == [CardProcess(10**6 + 1, "process", 2**32)]


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
def test_without_a_driver_nothing_is_known(library: Callable[..., None], function: str) -> None:
    library(**{function: failing})
    assert card_names() == []


def test_without_the_library_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert card_names() == []
    assert other_processes("0-1", 0) == []
