"""The most bytes that tensors made inside a context held at once, tensors without data among them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """Counts the storages that operators return while it is active, until they are freed.

    Attributes:
        live: bytes held now.
        peak: the most bytes held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {part.untyped_storage()._cdata for part in tree_leaves((args, kwargs)) if _is_tensor(part)}
        for part in filter(_is_tensor, tree_leaves(found)):
            storage = part.untyped_storage()
            # A view, or what was written in place, is no new memory.
            if storage._cdata not in given | self._held:
                self._held.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return found

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


def _is_tensor(value: Any) -> bool:
    # What oneDNN has laid out for itself does not tell its size.
    return isinstance(value, torch.Tensor) and not value.is_mkldnn
