"""What a run has kept outlives kills and damage; in processes of their own, whose gradients fork no threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def script(name: str, *arguments: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", f"tests.{name}", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    kills = os.environ.get("MIDTUNE_KILLS", "100")
    script("kills", "--kills", kills, "--folder", str(tmp_path))


@pytest.mark.slow
def test_no_damage_is_accepted(tmp_path: Path) -> None:
    script("damages", "--folder", str(tmp_path))
