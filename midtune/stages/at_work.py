"""Guards for a stage that works in a run folder: the lock, signals, and a clear error when it cannot continue."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from midtune import processes
from midtune.errors import NO_MEMORY, Interrupted, RunStopped, lack_of
from midtune.model.memory import is_out_of_memory
from midtune.runs import RunFolder

OTHER_LOST = "another of its processes ended early, most often killed because memory ran out; make room"
SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


@dataclass
class Stop:
    """Stop requests from Ctrl-C, SIGTERM and SIGHUP.

    With `waits`, the first request sets `asked` and waits for the end of the step. Any other stops at once.
    """

    asked: bool = False
    waits: bool = False

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Let the first request wait for the end of the step; the caller checks `asked`."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


@contextmanager
def at_work(folder: RunFolder, command: str) -> Iterator[Stop]:
    """Hold the folder's lock while `midtune COMMAND` works in it.

    Raises:
        InputError: another process holds the lock.
        Interrupted: a signal stopped the run, and it can be resumed.
        RunStopped: disk or memory ran out, or the folder is gone or cannot be written.
    """
    stop = Stop()
    go_on = f"go on with `midtune {command} --resume {folder}`"
    try:
        with _signals(stop), folder.locked():
            yield stop
    except KeyboardInterrupt:
        if not folder.config.is_file():
            raise
        raise Interrupted(f"stopped; {go_on}.") from None
    except Exception as error:
        lack = NO_MEMORY if is_out_of_memory(error) else lack_of(error)
        if processes.is_lost(error):
            lack = OTHER_LOST
        if isinstance(error, OSError) and folder.is_gone():
            raise RunStopped(f"{folder} was removed while it was worked in; start again.") from error
        if lack is None:
            if folder.config.is_file():
                error.add_note(f"the run is in {folder}")
            raise
        then = go_on if folder.config.is_file() else "start again"
        raise RunStopped(f"{folder} could not be finished because {lack}, then {then}.") from error


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    def ask(number: int, frame: Any) -> None:
        if not stop.waits or stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Signals that are already ignored, as SIGHUP is under nohup, stay ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
