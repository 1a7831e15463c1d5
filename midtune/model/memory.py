"""Return freed memory to the system at once, and retry with fewer rows when memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from midtune.errors import RunStopped

# glibc's mallopt: larger allocations are mapped one by one, and returned when freed.
M_MMAP_THRESHOLD = -3
# Upper end of glibc's own moving threshold on 64-bit systems; smaller working memory is better kept.
MAPPED_AT_MOST = 2**25
# Messages of errors other than `torch.OutOfMemoryError`: from the CPU allocator, the driver, bitsandbytes' kernels,
# and libraries without room for their own buffers.
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
    """How many rows go through the model together: all until memory runs out, then half, for good."""

    work: str  # its name in messages
    instead: str  # advice when a single group is too large
    rows: int | None = None  # current limit; None: none met yet
    on_message: Callable[[str], None] | None = None  # receives a sentence for the user
    halves: bool = True  # False: pass out-of-memory errors on
    on_oom_hint: Callable[[], str] = str  # says what else takes memory; may be empty

    @contextlib.contextmanager
    def at_most(self, rows: int) -> Iterator[None]:
        """Inside, no more than `rows` go together."""
        usual, self.rows = self.rows, min(rows, self.rows or rows)
        lowered = self.rows
        try:
            yield
        finally:
            # It is lower still if memory ran out.
            self.rows = usual if self.rows == lowered else self.rows

    def fitting(self, groups: int, group_size: int, run: Callable[[int], T]) -> T:
        """Call `run` with how many groups go together; call it again with half of them each time memory runs out.

        `run` does all the work each time. Groups stay whole; raises RunStopped if a single one does not fit.
        """
        while True:
            together = groups if self.rows is None else max(1, min(groups, self.rows // group_size))
            try:
                return run(together)
            except Exception as error:
                if not (self.halves and is_out_of_memory(error)):
                    raise
            # Only after the except block: the error's traceback keeps what `run` allocated.
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
    """Split 0…count−1 into slices of `size`; the last may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a card or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in words for sign in OUT_OF_MEMORY)


def give_back() -> None:
    """Return unused memory to the system and to other users of the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _call_glibc("malloc_trim", 0)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Return memory allocated inside to the system as soon as it is freed; does nothing without glibc.

    glibc would keep it: SmolLM2-135M loaded in NF4 held 556 MiB, as in fp32, instead of 169.
    """
    _call_glibc("mallopt", M_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        _call_glibc("mallopt", M_MMAP_THRESHOLD, MAPPED_AT_MOST)


def _call_glibc(name: str, *numbers: int) -> None:
    if sys.platform == "linux" and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*numbers)
