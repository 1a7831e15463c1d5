"""Peak bytes of tensors made inside a context, including tensors without data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from midtune.model.memory import MAPPED_AT_MOST
from midtune.planning.budget import Held


class Tracker(TorchDispatchMode):
    """Counts storages that operators return while it is active, until they are freed; views of `known` do not count.

    A shallow model measures a deep one: one block stands for any number of equal ones. What it leaves behind when the
    next block is done counts for each of them, for as long as it is held. Its temporaries count once, since blocks run
    one at a time.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Storages by address: existing ones, and those counted until they are freed.
        self._held: dict[int, Any] = {part.untyped_storage()._cdata: part for part in known}
        # Bytes of all storages, and of those small enough for a CPU's heap (larger ones are mapped one by one);
        # then the same two for the repeated block alone. `_moments` has them after each operator.
        self._now = (0, 0, 0, 0)
        self._moments = [self._now]
        self._kept = self._now
        self._inside = False
        self._entered = 0
        self._due = False

    @contextlib.contextmanager
    def repeated(self, blocks: Sequence[nn.Module] | nn.ModuleList, place: int) -> Iterator[None]:
        """Let the block at `place` stand for others, if a block follows it; run only forward passes inside."""
        with contextlib.ExitStack() as hooks:
            if place + 1 < len(blocks):
                hooks.enter_context(blocks[place].register_forward_pre_hook(lambda *_: self._enter()))
                hooks.enter_context(blocks[place].register_forward_hook(lambda *_: self._leave()))
                hooks.enter_context(blocks[place + 1].register_forward_hook(lambda *_: self._done()))
            yield

    @contextlib.contextmanager
    def made_by_repeated(self) -> Iterator[None]:
        """Count what is made here as made by the repeated block."""
        self._enter()
        yield
        self._leave()
        self._done()

    def _enter(self) -> None:
        self._settle()
        self._inside, self._entered = True, len(self._moments)

    def _leave(self) -> None:
        self._inside = False

    def _done(self) -> None:
        # Settle later: the caller still holds the block's inputs.
        self._due = True

    def _settle(self) -> None:
        """While the last repeated block works, those before it have left behind what it leaves."""
        if self._due:
            self._due = False
            left = self._now[2:]
            since = self._entered
            self._moments[since:] = [(*moment[:2], *left) for moment in self._moments[since:]]

    def keep(self) -> None:
        """Record what is held now as `Held.kept`."""
        self._settle()
        self._kept = self._now

    def held(self, more: int = 0) -> Held:
        """What was kept and the peak, with the repeated block counted `more` times in addition."""
        kept, *totals = np.array([self._kept, *self._moments]) @ [[1, 0], [0, 1], [more, 0], [0, more]]
        peak, small = np.max(totals, 0)
        return Held(int(kept[0]), int(peak), int(small))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._held.clear()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._settle()
        found = func(*args, **(kwargs or {}))
        for part in _tensors(found):
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                size, own = storage.nbytes(), self._inside
                self._held[key] = weakref.ref(storage, partial(self._free, key, size, own))
                self._count(size, own)
                self._moments.append(self._now)
        return found

    def _free(self, key: int, size: int, own: bool, _: Any) -> None:
        if self._held.pop(key, None) is not None:
            self._count(-size, own)

    def _count(self, size: int, own: bool) -> None:
        small = size if abs(size) < MAPPED_AT_MOST else 0
        every, every_small, owned, owned_small = self._now
        self._now = every + size, every_small + small, owned + own * size, owned_small + own * small


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    # Tensors in oneDNN's own layout do not report their size.
    if isinstance(value, torch.Tensor):
        if not value.is_mkldnn:
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
