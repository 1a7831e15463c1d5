"""Opening a model says what else uses its card; opening a task measures its prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from midtune.config import RunConfig, load_config
from midtune.errors import InputError, RunStopped
from midtune.measure.cards import other_processes
from midtune.model.quantize import linears_in_4_bit
from midtune.report.terminal import Terminal
from midtune.rollout.sampling import Sampler
from midtune.stages import export, opening
from midtune.stages.opening import Opened
from tests.stages.conftest import Configured

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


def test_in_a_container_the_process_that_holds_as_much_is_this_one(sleeping: int) -> None:
    library = sys.modules["pynvml"]
    listed = [
        SimpleNamespace(pid=2**22 + place, usedGpuMemory=held * GIB) for place, held in enumerate((5, 18))
    ]
    vars(library)["nvmlDeviceGetComputeRunningProcesses"] = lambda card: listed
    assert other_processes("0-1", 4 * GIB) == [(2**22 + 1, "process", 18 * GIB)]
    assert other_processes("0-1", 20 * GIB) == [(2**22, "process", 5 * GIB)]


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


PROMPTS = [f"{n} + {n} = {'? ' * n}" for n in range(12)]


def test_long_prompts_are_counted_and_refused_or_dropped(
    configured: Configured, terminal: Terminal, tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in PROMPTS]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    of_long: dict[str, Any] = {
        "task__name": str(tmp_path / "long.jsonl"),
        "task__reward": "numeric",
        "task__prompt_format": "plain",
        "task__eval_size": 4,
    }
    whole = Opened(configured(**of_long), terminal).task
    assert len(whole.train) + len(whole.held_out) == 12
    with pytest.raises(
        InputError, match=r"\d of 12 prompts are longer than 20 tokens, the longest \d\d; raise"
    ):
        _ = Opened(configured(**of_long, task__max_prompt_tokens=20), terminal).task
    short = Opened(configured(**of_long, task__max_prompt_tokens=20, task__bad_rows="drop"), terminal).task
    kept = {row["question"] for row in [*short.train, *short.held_out]}
    assert PROMPTS[0] in {f"{question} " for question in kept}
    assert PROMPTS[11].strip() not in kept
    assert short.note is not None and "left them out" in short.note


def packed(config: RunConfig) -> dict[str, torch.Tensor]:
    policy = Opened(config, Terminal(quiet=True)).policy()
    return {name: layer.weight.data for name, layer in linears_in_4_bit(policy.model).items()}


def test_calibrated_weights_are_the_same_each_time(configured: Configured) -> None:
    config = configured(model__rounding="calibrated")
    found, again, nearest = packed(config), packed(config), packed(configured())
    assert found.keys() == nearest.keys() and len(found) == 28
    for name, codes in found.items():
        assert torch.equal(codes, again[name]) and not torch.equal(codes, nearest[name])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    packed(config)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_have_been_rounded_are_not_calibrated(
    finished: tuple[Path, dict[str, Any]], configured: Configured, tmp_path: Path
) -> None:
    run, quiet = finished[0], Terminal(quiet=True)
    export.run(run, out=tmp_path / "stored", terminal=quiet, to="nf4")
    config = configured(model__name=str(tmp_path / "stored"), model__rounding="calibrated")
    with pytest.raises(InputError, match="is stored in 4-bit already; leave out model.rounding=calibrated"):
        Opened(config, quiet).policy()
