"""Memory of weights that come and go, given back to the system at once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch

# glibc's mallopt: allocations of this many bytes are mapped one by one, and go back when they are freed.
M_MMAP_THRESHOLD = -3
MAPPED_FOR_NOW = 2**16
# Where glibc's own moving threshold ends on 64-bit systems; working memory is better kept.
MAPPED_AT_MOST = 2**25


def give_back() -> None:
    """Give memory that nothing uses any more back to the system and to other users of the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """What is allocated inside goes back to the system as soon as it is freed, whenever that is.

    glibc keeps freed memory for itself, and what is allocated later breaks it up: loading SmolLM2-135M in NF4
    would hold as much as in fp32, 556 MiB in place of 169. Does nothing where there is no glibc.
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
