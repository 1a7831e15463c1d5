"""Runs `steps.py`, a card's work without a card, under a CUDA build of torch that is installed for it and kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.version import Version
from platformdirs import user_cache_path

FREE_BYTES = 10 * 2**30
INSTALL_S, RUN_S = 1800, 900
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_steps(cuda_torch: Path) -> None:
    path = os.pathsep.join([str(cuda_torch), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "", "tests/fake_cuda/steps.py"],
        cwd=ROOT,
        # Where there is a card, it is hidden.
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
    )
    if run.returncode != 0:
        pytest.fail(run.stdout, pytrace=False)


@pytest.fixture(scope="module")
def cuda_torch() -> Path:
    """A folder to import a CUDA build of torch from, of the version in use; all else comes from where tests run."""
    if torch.version.cuda is not None:
        return ROOT
    if sys.platform != "linux":
        cannot("CUDA's part of torch is reached into as it is on Linux")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Nothing but this very name: a CPU build is called 2.13.0+cpu.
    wanted = [f"torch==={Version(importlib.metadata.version('torch')).public}", *shared_with_torch()]
    cache = Path(os.environ.get("MIDTUNE_TEST_CACHE") or user_cache_path("midtune") / "tests")
    key = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]
    folder = cache / f"cuda-torch-{python}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "cuda-torch.lock"):
        if not folder.exists():
            for old in cache.glob(f"cuda-torch-{python}-*"):
                shutil.rmtree(old)
            install(wanted, folder)
    return folder


def shared_with_torch() -> list[str]:
    """What torch needs that is installed here, as it is here."""
    needed = [Requirement(line) for line in importlib.metadata.requires("torch") or []]
    names = [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return sorted(f"{name}=={importlib.metadata.version(name)}" for name in names)


def install(wanted: list[str], folder: Path) -> None:
    """Install packages into a folder of their own, whole or not at all."""
    if shutil.disk_usage(folder.parent).free < FREE_BYTES:
        cannot(
            f"{folder.parent} has less than {FREE_BYTES >> 30} GiB free, and a CUDA build of torch takes 5"
        )
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", part, *wanted]
    # pip builds the folder beside where it goes, so that moving it copies nothing.
    made = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_S,
    )
    if made.returncode != 0:
        shutil.rmtree(part)
        cannot(f"{wanted[0]} cannot be installed: {made.stdout.strip()[-500:]}")
    part.rename(folder)


def cannot(why: str) -> None:
    """Skip, or fail where all checks have to be made."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
