"""Sandboxes for tests: one that isolates, and one for programs that mean no harm."""

from __future__ import annotations

import pytest

from midtune.config import SandboxConfig
from midtune.errors import InputError
from midtune.tasks import open_sandbox
from midtune.tasks.sandbox.sandbox import Sandbox

LIMITS = SandboxConfig(cpu_s=1, wall_s=10.0, memory_mib=128, processes=4, workers=2)


def opened(*, allow_weak: bool) -> Sandbox:
    try:
        return open_sandbox(LIMITS.model_copy(update={"allow_weak": allow_weak}))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def isolated() -> Sandbox:
    """For hostile programs; the test is skipped where nothing isolates them."""
    return opened(allow_weak=False)


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """For the tests' own programs, with weak isolation where there is no other."""
    return opened(allow_weak=True)
