"""Runs that several processes share, against those of one; and what becomes of them when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from midtune import processes
from midtune.config import RunConfig, dump_config
from midtune.errors import InputError
from midtune.rollout.sampling import Sampling
from midtune.runs import RunFolder
from midtune.stages import train
from tests.stages.conftest import Configured, configured, terminal  # noqa: F401

# What the clock and the memory say.
MEASURED = ("_s", "_bytes", "digest")


def test_a_single_process_is_all_of_them() -> None:
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.gathered([1, 2]) == [1, 2]
    assert processes.from_main(lambda: 3) == 3
    assert processes.share(5) == slice(0, 5)
    with processes.main_first(), processes.together(lambda: True):
        assert not processes.is_joined()


def test_things_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for place in range(3):
        monkeypatch.setenv("RANK", str(place))
        found.append((list(range(8))[processes.share(8)], processes.share(2)))
    assert [part for part, _ in found] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    # Too few to share: each has all.
    assert [few for _, few in found] == [slice(0, 2)] * 3


def test_rows_draw_the_numbers_that_one_process_would_draw_for_them() -> None:
    def drawn(rows: int, others: tuple[int, int]) -> torch.Tensor:
        torch.manual_seed(3)
        found = Sampling(5, others=others).uniforms(5, rows, device=torch.device("cpu"))
        assert found is not None
        return found

    whole = drawn(8, (0, 0))
    parts = [drawn(2, (0, 6)), drawn(3, (2, 3)), drawn(3, (5, 0))]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert Sampling(5, temperature=0.0).uniforms(5, 8, device=torch.device("cpu")) is None


def test_prompts_that_cannot_be_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.even_share(6) == 2
    assert processes.even_share(8, 4) == 2
    with pytest.raises(InputError, match="8 prompts a step cannot be shared evenly among 3 processes"):
        processes.even_share(8)


def command_of(config: RunConfig, out: Path, devices: int, *others: str) -> list[str]:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(dump_config(config))
    new = ["--recipe", str(recipe), "--out", str(out)]
    launcher = [] if devices == 1 else ["--devices", str(devices)]
    return [sys.executable, "-m", "midtune", "train", *(others or new), *launcher]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = RunFolder(run.absolute()).read_metrics()
    return [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in lines]


def assert_equal_to_rounding(one: Path, other: Path) -> None:
    """The same metrics, scores and blocks; rounding moves a float a little, and never a token."""
    steps, others = metrics_of(one), metrics_of(other)
    assert [step.keys() for step in steps] == [step.keys() for step in others]
    for step, same in zip(steps, others, strict=True):
        for name, value in step.items():
            if name != "tokens_per_s":
                assert same[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step["step"], name)
    written = [(run / "samples.jsonl").read_text().strip("\n").split("\n") for run in (one, other)]
    samples = [[json.loads(line)["completion"] for line in lines] for lines in written]
    assert samples[0] == samples[1]
    starts, reports = [], []
    for run in (one, other):
        folder = RunFolder(run.absolute())
        starts.append({k: v for k, v in folder.read_json(folder.start).items() if k != "kept"})
        reports.append(folder.read_json(folder.report)["quality"])
    assert starts[0] == starts[1] and reports[0] == reports[1]
    patches = [load_file(run / "patch" / "patch.safetensors") for run in (one, other)]
    for name, tensor in patches[0].items():
        torch.testing.assert_close(patches[1][name], tensor, rtol=1e-4, atol=1e-6)


TWENTY = {
    "training__steps": 20,
    "training__prompts_per_step": 6,
    "training__group_size": 4,
    "training__lr": "auto",
    "evaluation__deployed": False,
    "task__eval_size": 9,
}


def test_two_processes_make_the_run_that_one_makes(
    configured: Configured,  # noqa: F811
    tmp_path: Path,
    terminal: Any,  # noqa: F811
) -> None:
    config = configured(**TWENTY)
    train.run(config, out=tmp_path / "one", resume=None, terminal=terminal)
    finished = run([*command_of(config, tmp_path / "two", 2), "--json"])
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert any("2 processes shared each step" in note for note in report["notes"])
    assert finished.stderr.count("run folder:") == 1
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_bad_input_is_said_once(configured: Configured, tmp_path: Path) -> None:  # noqa: F811
    config = configured(training__prompts_per_step=3)
    refused = run(command_of(config, tmp_path / "run", 2))
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "error: 3 prompts a step cannot be shared evenly among 2 processes; choose a multiple of 2 with "
        "--prompts-per-step, or another number of --devices."
    ]
    assert refused.stdout == "" and not (tmp_path / "run").exists()


def started(
    command: list[str], folder: Path, steps: int
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run that has made so many steps, and its processes in their order."""
    launched = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
        assert launched.poll() is None, launched.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = sorted(psutil.Process(launched.pid).children(), key=lambda child: child.create_time())
    return launched, [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def ended(launched: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The exit code of a run that is to end soon, and what it said of errors."""
    said = launched.communicate(timeout=100)[1]
    assert "Traceback" not in said
    return launched.returncode, [line for line in said.splitlines() if line.startswith("error:")]


LONG = {**TWENTY, "training__steps": 200, "training__max_new_tokens": 24}


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_goes_on_with_another_number(
    configured: Configured,  # noqa: F811
    tmp_path: Path,
    terminal: Any,  # noqa: F811
) -> None:
    train.run(configured(**LONG), out=tmp_path / "whole", resume=None, terminal=terminal)
    folder = tmp_path / "run"
    launched, children = started(command_of(configured(**LONG), folder, 2), folder, 20)
    children[1].kill()
    code, said = ended(launched)
    assert (code, len(said)) == (3, 1)
    assert "another of its processes ended early" in said[0] and "midtune train --resume" in said[0]
    resume = (str(folder), "--resume")
    launched, children = started(command_of(configured(), folder, 3, *resume), folder, 60)
    children[0].kill()
    code, said = ended(launched)
    assert (code, len(said)) == (3, 1)
    launched, children = started(command_of(configured(), folder, 1, *resume), folder, 100)
    launched.send_signal(signal.SIGTERM)
    assert ended(launched)[0] == 130
    finished = run(command_of(configured(), folder, 2, *resume))
    assert finished.returncode == 0, finished.stderr
    assert_equal_to_rounding(tmp_path / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_stop_after_the_step_with_its_checkpoint(
    configured: Configured,  # noqa: F811
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    folder = tmp_path / "run"
    launched, _ = started(command_of(configured(**LONG), folder, 2), folder, 5)
    launched.send_signal(number)
    code, said = ended(launched)
    assert code == 130 and len(said) == 1 and "error: stopped after step" in said[0]
    last = len((folder / "metrics.jsonl").read_text().splitlines())
    assert (folder / "checkpoints" / f"checkpoint-{last}").is_dir()


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(configured: Configured, tmp_path: Path) -> None:  # noqa: F811
    reward = tmp_path / "failing.py"
    reward.write_text(
        "import os\n"
        "def digits(completions, **columns):\n"
        "    if os.environ['RANK'] == '1' and os.path.exists('fail'):\n"
        "        raise ValueError('no such thing')\n"
        "    return [float(len(text) % 3) for text in map(str, completions)]\n"
    )
    config = configured(**{**LONG, "task__reward": f"{reward}:digits"})
    folder = tmp_path / "run"
    launched, _ = started(command_of(config, folder, 2), folder, 5)
    fail = Path("fail")
    fail.touch()
    try:
        code, said = ended(launched)
    finally:
        fail.unlink()
    assert (code, len(said)) == (1, 1) and "no such thing" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "midtune"],
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=3", "-m", "midtune"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_three_processes_of_a_launcher_make_the_run_that_one_makes(
    configured: Configured,  # noqa: F811
    tmp_path: Path,
    terminal: Any,  # noqa: F811
    launcher: list[str],
) -> None:
    config = configured(**{**TWENTY, "evaluation__deployed": True, "evaluation__baseline": "measured"})
    train.run(config, out=tmp_path / "one", resume=None, terminal=terminal)
    _, _, _, *words = command_of(config, tmp_path / "three", 1)
    finished = run([sys.executable, *launcher, *words])
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "three")
