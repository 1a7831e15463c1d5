"""The most bytes that tensors made inside a context held at once, tensors without data among them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from midtune.model.memory import MAPPED_AT_MOST


class Tracker(TorchDispatchMode):
    """Counts the storages that operators return while it is active, until they are freed.

    Args:
        known: tensors that are there already; views of them are no new memory.

    Attributes:
        live: bytes held now.
        peak: the most bytes held at once.
        small_peak: the most of them that storages held at once that a CPU's heap has room for: larger
            ones are mapped one by one.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.small_peak = self._small = 0
        # Storages by address: those that were there already, and those that are counted until they go.
        self._held: dict[int, Any] = {part.untyped_storage()._cdata: part for part in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in _tensors(found):
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                size = storage.nbytes()
                self._held[key] = weakref.ref(storage, partial(self._free, key, size))
                self._count(size)
        self.peak = max(self.peak, self.live)
        self.small_peak = max(self.small_peak, self._small)
        return found

    def _free(self, key: int, size: int, _: Any) -> None:
        del self._held[key]
        self._count(-size)

    def _count(self, size: int) -> None:
        self.live += size
        self._small += size if abs(size) < MAPPED_AT_MOST else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    # What oneDNN has laid out for itself does not tell its size.
    if isinstance(value, torch.Tensor):
        if not value.is_mkldnn:
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
