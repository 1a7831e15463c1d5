"""The processes that share one run: a card each, or a part of the CPU.

`midtune train --devices N`, torchrun or `accelerate launch` starts them; accelerate carries what they exchange. In a
single process, everything here is as if it were the only one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

from midtune.errors import InputError, Interrupted, MidtuneError, RunStopped

# One process may load, score or write for hours while the others wait; one that died is noticed otherwise.
PATIENCE = timedelta(days=7)
# Seconds that the others have to end by themselves when a process has failed.
GRACE_S = 30.0
# What a launcher says to a process about its place.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

T = TypeVar("T")


class Several(Exception):
    """A command is to run in `count` processes; `cli.main` starts them."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class EndedByAnother(MidtuneError):
    """Another process failed, and has said why; this one ends with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def count() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes and prints."""
    return index() == 0


def is_joined() -> bool:
    """Whether this process is in a group with the others."""
    torch = sys.modules.get("torch")
    return count() > 1 and torch is not None and torch.distributed.is_initialized()


def share(length: int) -> slice:
    """This process's part of as many things in a row; all of them if there are too few to give each process one."""
    if length < count():
        return slice(0, length)
    return slice(length * index() // count(), length * (index() + 1) // count())


def even_share(prompts: int, devices: int | None = None) -> int:
    """Each process's part of a step's prompts; raises InputError if they cannot be shared evenly."""
    devices = devices or count()
    if prompts % devices:
        raise InputError(
            f"{prompts} prompts a step cannot be shared evenly among {devices} processes; choose a multiple of "
            f"{devices} with --prompts-per-step, or another number of --devices."
        )
    return prompts // devices


def gathered(values: list[T]) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return values
    from accelerate.utils import gather_object

    found: list[T] = gather_object(values)
    return found


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process; the others wait for it."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = broadcast_object_list([make() if is_main() else None])
    return found[0]


def main_first() -> AbstractContextManager[Any]:
    """Let the main process do what is inside, and then the others, who find what it downloaded or sent."""
    if count() == 1:
        return contextlib.nullcontext()
    from accelerate import PartialState

    return PartialState().main_process_first()


@contextlib.contextmanager
def together(on_cpu: Callable[[], bool]) -> Iterator[None]:
    """Join the others for what runs inside; `on_cpu` says whether it runs on the CPU.

    If one process fails, all end: the first to fail raises its error, the others `EndedByAnother`.
    """
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    place = {name: os.environ[name] for name in PLACE if name in os.environ}
    PartialState(cpu=on_cpu(), timeout=PATIENCE)
    try:
        yield
        part()
        os.environ.update(place)
    except BaseException as error:
        code = error.exit_code if isinstance(error, MidtuneError) else 1
        code = Interrupted.exit_code if isinstance(error, KeyboardInterrupt) else code
        if is_joined() and (first := _first_failure(code)) is not None:
            raise EndedByAnother(first) from error
        raise


def part() -> None:
    """Leave the group when all have come here; from then on the main process is the only one."""
    if not is_joined():
        return
    import torch
    from accelerate.state import AcceleratorState, PartialState

    PartialState().wait_for_everyone()
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    alone()


def alone() -> bool:
    """Let the main process work as the only one; False in the others, which have nothing to do."""
    if is_main():
        for name in PLACE:
            os.environ.pop(name, None)
    return is_main()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    if not is_joined():
        return False
    import torch

    lost = isinstance(error, torch.distributed.DistError)
    return lost or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def launch(devices: int, run: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Call `run` in as many processes on this machine; returns the exit code of the first to fail, or 0.

    Ctrl-C and other signals are passed on. Raises RunStopped if a process was killed and no other could say so.
    """
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // devices)))
    context = start_processes(_start, (devices, store.port, run, arguments), devices, join=False)

    stopped: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        stopped.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        while not context.join(grace_period=GRACE_S):
            pass
    except ProcessExitedException as error:
        if error.exit_code >= 0:
            return int(error.exit_code)
        if not stopped and not store.check([_FAILED]):
            raise RunStopped(
                f"process {error.error_index} of {devices} was killed ({error.signal_name}), most often because memory "
                "ran out; make room, then go on with `midtune train --resume` and the run's folder."
            ) from None
        return Interrupted.exit_code if stopped else RunStopped.exit_code
    # Before they hear signals, they end without a word.
    return Interrupted.exit_code if stopped else 0


def _start(
    place: int, devices: int, port: int, run: Callable[[list[str]], None], arguments: list[str]
) -> None:
    """Be one of the processes of `launch`."""
    if hasattr(os, "setpgrp"):
        # Ctrl-C is for the launching process, which passes it on.
        os.setpgrp()
    numbers = dict(zip(PLACE, (place, devices, place, devices), strict=True))
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The launching process holds what they meet through, so that it outlives each of them.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    run(arguments)


_FAILED = f"midtune/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _first_failure(code: int) -> int | None:
    """The exit code of the process that failed before this one; None if this is the first, or nothing is known."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    own = f"{index()} {code}"
    try:
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=10))
        found = store.compare_set(_FAILED, "", own).decode()
    except (RuntimeError, LookupError):
        return None
    return None if found == own else int(found.split()[1])
