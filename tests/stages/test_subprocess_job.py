from __future__ import annotations

import os
from pathlib import Path

import pytest

from midtune.errors import MidtuneError
from midtune.stages.subprocess_job import in_own_process

JOBS = """
import atexit, os, signal
from midtune.stages.subprocess_job import say

def speak():
    say("a third")
    print("a word of a library")
    say("two thirds")
    atexit.register(print)
    return {"said": 2}

def add(a, b):
    print("a word of a library")
    return {"sum": a + b, "process": os.getpid()}

def fail(why):
    raise ValueError(why)

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    package = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{package}")


def test_a_function_is_called_in_another_process() -> None:
    found = in_own_process("jobs:add", {"a": "é" * 200_000, "b": "ü"}, what="x", instead="y")
    assert found["sum"] == "é" * 200_000 + "ü"
    assert found["process"] != os.getpid()


def test_what_a_job_says_is_passed_on() -> None:
    said: list[str] = []
    assert in_own_process("jobs:speak", {}, what="x", instead="y", on_message=said.append) == {"said": 2}
    assert said == ["a third", "two thirds"]
    assert in_own_process("jobs:speak", {}, what="x", instead="y") == {"said": 2}


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        (
            "jobs:die",
            {},
            "the arm x failed .it was killed, most likely because memory ran out.; leave it out.",
        ),
        ("jobs:fail", {"why": "no room"}, "the arm x failed .ValueError: no room.; leave it out."),
    ],
)
def test_a_process_that_fails_says_why(job: str, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(MidtuneError, match=words):
        in_own_process(job, arguments, what="the arm x", instead="leave it out")
