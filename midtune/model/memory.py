"""Memory given back to the system at once, and what to do when there is not enough of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from midtune.errors import RunStopped

# glibc's mallopt: allocations of this many bytes are mapped one by one, and go back when they are freed.
M_MMAP_THRESHOLD = -3
MAPPED_FOR_NOW = 2**16
# Where glibc's own moving threshold ends on 64-bit systems; working memory is better kept.
MAPPED_AT_MOST = 2**25
# What other errors than `torch.OutOfMemoryError` say: the CPU's allocator, the driver and bitsandbytes' kernels, then
# libraries that find no room for their own buffers.
OUT_OF_MEMORY = (
    "defaultcpuallocator",
    "out of memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "cudnn_status_not_initialized",
    "cusolver_status_alloc_failed",
)

T = TypeVar("T")


@dataclass
class RowLimit:
    """How many rows may go through the model together: all, until memory runs out; then half, for good.

    Args:
        work: what they go together in, for messages.
        instead: what to do where a single group is too much, for the message.
        rows: the most that may go together; None: no limit has been met.
        on_message: receives a sentence for the person who watches.
        halves: False: memory that runs out is an error like others.
        on_oom_hint: asked when memory runs out for a sentence on what else takes it; it may be empty.
    """

    work: str
    instead: str
    rows: int | None = None
    on_message: Callable[[str], None] | None = None
    halves: bool = True
    on_oom_hint: Callable[[], str] = str

    def fitting(self, groups: int, group_size: int, run: Callable[[int], T]) -> T:
        """The result of `run`, which is called again with half the groups each time memory runs out.

        Args:
            groups: most groups that should go together; groups stay whole.
            run: takes how many groups may go together, and does all of the work.

        Raises:
            RunStopped: a single group is too much.
        """
        while True:
            together = groups if self.rows is None else max(1, min(groups, self.rows // group_size))
            try:
                return run(together)
            except Exception as error:
                if not (self.halves and is_out_of_memory(error)):
                    raise
            # Not before here, since the error's traceback holds on to what `run` had allocated.
            give_back()
            if together == 1:
                alone = "completion" if group_size == 1 else f"group of {group_size} completions"
                why = f"memory ran out in {self.work} with a single {alone}; {self.instead}."
                raise RunStopped(f"{why} {self.on_oom_hint()}".rstrip())
            self.rows = together // 2 * group_size
            if self.on_message is not None:
                self.on_message(
                    f"memory ran out in {self.work} with {together * group_size} completions together; "
                    f"from now on at most {self.rows} go together. {self.on_oom_hint()}".rstrip()
                )


def slices(count: int, size: int) -> list[slice]:
    """0…count−1 in pieces of `size`, the last one maybe smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory left, on a card or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in words for sign in OUT_OF_MEMORY)


def give_back() -> None:
    """Give memory that nothing uses any more back to the system and to other users of the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """What is allocated inside goes back to the system as soon as it is freed.

    glibc would keep it: SmolLM2-135M loaded in NF4 held 556 MiB, as in fp32, in place of 169. Does nothing without
    glibc.
    """
    if (mallopt := _glibc("mallopt")) is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MAPPED_FOR_NOW)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, MAPPED_AT_MOST)


def _glibc(name: str) -> Any:
    """A function of glibc, or None where there is no glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
