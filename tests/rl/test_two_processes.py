"""Two processes over gloo take the step that one takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_two_processes_take_the_step_that_one_takes(
    random_checkpoint: Callable[..., Path], tmp_path: Path, algorithm: str
) -> None:
    checkpoint = random_checkpoint("qwen3")
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        script = [str(Path(__file__).with_name("one_of_two.py"))]
        finished = subprocess.run(
            [
                sys.executable,
                *(launcher if processes > 1 else []),
                *script,
                str(checkpoint),
                str(tmp_path),
                algorithm,
                str(processes),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
    one, two = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    start = load_file(checkpoint / "model.safetensors")
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert float(moved.norm()) > 0
    assert float(apart.norm() / moved.norm()) < 1e-5
