import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from midtune import device as devices
from midtune.device import (
    ONLY_CARD,
    compute_dtype_of,
    dtype_named,
    free_bytes,
    random_state,
    resolve_device,
    set_random_state,
    show_one_card,
    spills_to_host,
)
from midtune.errors import InputError

GIB = 2**30


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`torch.cuda` of a machine with two cards that torch has started to use."""
    limits: list[tuple[float, torch.device]] = []
    stand_in = SimpleNamespace(
        limits=limits,
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda device: (3 * GIB, 24 * GIB),
        memory_reserved=lambda device: 20 * GIB,
        memory_allocated=lambda device: 8 * GIB,
        set_per_process_memory_fraction=lambda share, device: limits.append((share, device)),
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", ONLY_CARD):
        # Set and taken away, so that what a test sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus_compute_in_bf16_where_they_have_it(
    cuda: SimpleNamespace, supported: bool, dtype: torch.dtype
) -> None:
    cuda.is_bf16_supported = lambda including_emulation: supported
    assert compute_dtype_of(torch.device("cuda")) == dtype


def test_cpus_compute_in_fp32() -> None:
    assert compute_dtype_of(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("device", "reason"),
    [("gpu", "not known"), ("mps", "not supported"), ("cuda:99", "asked for, but this machine has")],
)
def test_a_device_that_does_not_exist_is_refused(device: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resolve_device(device)


def test_dtypes_by_name() -> None:
    named = {name: dtype_named(name) for name in ("auto", "bf16", "fp16", "fp32")}
    assert named == {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize(
    ("name", "cards", "visible", "sees", "only"),
    [
        ("auto", 2, None, "0", "0"),
        ("cuda", 4, None, "0", "0"),
        ("cuda:1", 2, None, "1", "1"),
        # Numbers count what is visible, as torch's do.
        ("cuda:1", 4, "3,2", "2", "1"),
        ("cuda:1", 8, "GPU-a,GPU-b,GPU-c", "GPU-b", "1"),
        # Nothing to hide.
        ("auto", 1, None, None, None),
        ("auto", 0, None, None, None),
        ("cuda", 2, "1", "1", None),
        ("cpu", 2, None, None, None),
        # A card that is not there is refused where torch has counted.
        ("cuda:7", 2, None, None, None),
        ("nonsense", 1, None, None, None),
    ],
)
def test_only_the_card_of_a_run_is_visible(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cards: int,
    visible: str | None,
    sees: str | None,
    only: str | None,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    show_one_card(name, cards)
    assert (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get(ONLY_CARD)) == (sees, only)


def test_a_process_that_is_started_sees_the_same_card(cuda: SimpleNamespace) -> None:
    show_one_card("cuda:1", 2)
    cuda.device_count = lambda: 1
    show_one_card("cuda:1", 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert resolve_device("cuda:1") == torch.device("cuda:0")


def test_a_launcher_gives_each_process_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,6,7"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    show_one_card("auto", 8)
    show_one_card("auto", 8)
    # accelerate finds it as its own first one.
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == ("6", "0")


def test_a_single_process_of_a_launcher_sees_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    show_one_card("auto", 2)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("name", "cards"), [("auto", 2), ("cuda:1", 8)])
def test_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch, name: str, cards: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match=f"3 processes need a card each, but --device {name} has"):
        show_one_card(name, cards)


def test_what_the_allocator_keeps_is_free(cuda: SimpleNamespace) -> None:
    assert free_bytes("cuda:1") == 15 * GIB
    assert devices.total_bytes(torch.device("cuda:1")) == 24 * GIB


@pytest.mark.parametrize(
    ("system", "release", "spills"),
    [
        ("linux", "6.1.0-25-amd64", False),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", True),
        ("win32", "10", True),
    ],
)
def test_a_card_is_not_filled_where_the_driver_would_go_on_in_the_hosts_memory(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, system: str, release: str, spills: bool
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert spills_to_host() is spills
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert cuda.limits == ([(0.95, torch.device("cuda:1"))] if spills else [])


def test_a_generator_goes_back_to_its_state() -> None:
    state = random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    set_random_state(torch.device("cpu"), state)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_torch_freed_on_a_card_counts_as_free() -> None:
    target: Any = resolve_device("cuda")
    before = free_bytes(target)
    held = torch.empty(2**28, dtype=torch.uint8, device=target)
    assert before - free_bytes(target) >= 2**28
    del held
    assert torch.cuda.memory_reserved(target) >= 2**28
    # Other processes may have taken or given back some.
    assert abs(free_bytes(target) - before) < 2**26


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_process_sees_the_card_it_was_told_to_use() -> None:
    last = torch.cuda.device_count() - 1
    code = (
        "from midtune.device import resolve_device, show_one_card; from midtune.measure.cards import card_names; "
        f"show_one_card('cuda:{last}', len(card_names())); device = resolve_device('cuda:{last}'); import torch; "
        "torch.zeros(1, device=device); print(torch.cuda.device_count(), torch.cuda.get_device_properties(device).uuid)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["1", str(torch.cuda.get_device_properties(last).uuid)]
