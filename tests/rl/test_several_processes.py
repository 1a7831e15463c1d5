"""Two and three processes over gloo take the step that one takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rl.one_of_several import COMPARED, gradients


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_take_the_step_that_one_takes(
    random_checkpoint: Callable[..., Path], tmp_path: Path, count: int
) -> None:
    checkpoint = random_checkpoint("qwen3")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    script = str(Path(__file__).with_name("one_of_several.py"))
    finished = subprocess.run(
        [sys.executable, *launcher, script, str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    for what, settings in COMPARED.items():
        one = gradients(checkpoint, tmp_path, **settings)
        several = load_file(tmp_path / f"{what}-{count}.safetensors")
        sent = int(several.pop("sent"))
        assert one.keys() == several.keys()
        logged = [name for name in one if name.startswith("logged")]
        for name in logged:
            assert float(one.pop(name)) == pytest.approx(float(several.pop(name)), rel=1e-5, abs=1e-7), name
        whole = torch.cat([gradient.flatten() for gradient in one.values()])
        apart = torch.cat([(one[name] - several[name]).flatten() for name in one])
        assert float(whole.norm()) > 0
        assert float(apart.norm() / whole.norm()) < 1e-6, what
        # Nothing of size travels but the trained block's gradient.
        assert whole.nbytes <= sent < whole.nbytes + 2000
