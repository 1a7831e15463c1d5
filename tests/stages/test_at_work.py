"""What a stage says when it cannot go on, and when a signal may end it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from midtune.errors import InputError, Interrupted, RunStopped
from midtune.runs import LOCK, RunFolder
from midtune.stages.at_work import at_work


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "run", "")
    made.begin("{}", "cpu", 0)
    return made


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "access is denied"),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
    ],
)
def test_a_lack_ends_in_a_sentence_that_says_how_to_go_on(
    folder: RunFolder, error: Exception, reason: str
) -> None:
    with pytest.raises(RunStopped, match=f"{reason}.*go on with `midtune train --resume"):
        with at_work(folder, "train"):
            raise error
    assert not (folder.path / LOCK).exists()


def test_another_error_passes_as_it_is(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="^other$"), at_work(folder, "train"):
        raise ValueError("other")


def test_a_folder_that_was_removed_is_named(folder: RunFolder) -> None:
    with pytest.raises(RunStopped, match="was removed while it was worked in; start again"):
        with at_work(folder, "train"):
            shutil.rmtree(folder.path)
            (folder.path / "metrics.jsonl").write_text("{}")


def test_two_cannot_work_in_one_folder(folder: RunFolder) -> None:
    with at_work(folder, "train"):
        with pytest.raises(InputError, match="another midtune is at work in"):
            with at_work(RunFolder.open(folder.path), "train"):
                pass


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(folder: RunFolder) -> None:
    with pytest.raises(Interrupted, match="stopped; go on with `midtune train --resume"):
        with at_work(folder, "train") as stop, stop.after_the_step():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_outside_a_step_ends_at_once(folder: RunFolder) -> None:
    with pytest.raises(Interrupted), at_work(folder, "probe"):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal did not end it")
