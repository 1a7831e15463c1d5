"""The most bytes that tensors made inside a context held at once, tensors without data among them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from midtune.model.memory import MAPPED_AT_MOST
from midtune.planning.budget import Held


class Tracker(TorchDispatchMode):
    """Counts the storages that operators return while it is active, until they are freed.

    A deep model is measured on a shallow one, in which one block stands for any number that are alike: what it
    has left behind when the block after it is done counts for each of them, as long as it is there. What it
    only works with counts once, since no two blocks work at a time.

    Args:
        known: tensors that are there already; views of them are no new memory.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Storages by address: those that were there already, and those that are counted until they go.
        self._held: dict[int, Any] = {part.untyped_storage()._cdata: part for part in known}
        self._all, self._own, self._left = _Bytes(), _Bytes(), _Bytes()
        self._inside = self._due = False
        # What all blocks and what that block held at each operator, and where it is not known yet what of its
        # own it leaves behind.
        self._moments: list[tuple[_Bytes, _Bytes]] = []
        self._open: list[tuple[_Bytes, _Bytes]] = []
        self._kept = _Bytes(), _Bytes()

    @contextlib.contextmanager
    def repeated(self, block: nn.Module, after: nn.Module) -> Iterator[None]:
        """Let `block` stand for others too; `after` is the block after it, and both run forward here only."""

        def enter(*_: Any) -> None:
            self._inside = True

        def leave(*_: Any) -> None:
            self._inside = False

        def settle(*_: Any) -> None:
            # Not at once: what the block was given is still held by those who called it.
            self._due = True

        hooks = [
            block.register_forward_pre_hook(enter),
            block.register_forward_hook(leave),
            after.register_forward_hook(settle),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def made_by(self, repeated: bool) -> Iterator[None]:
        """Count what is made here as made by the block that stands for others, if it is `repeated`."""
        self._inside = repeated
        yield
        self._inside = False
        self._due = True

    def keep(self) -> None:
        """Remember what is held now as what is kept."""
        self._settle()
        self._kept = self._all, self._own.least(self._left)

    def held(self, more: int = 0) -> Held:
        """What was kept and the most that was held, where the block stands for so many others too."""
        self._close()
        totals = [every.plus(own, more) for every, own in self._moments]
        return Held(
            self._kept[0].plus(self._kept[1], more).every,
            max((total.every for total in totals), default=0),
            max((total.small for total in totals), default=0),
        )

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
                self._open.append((self._all, self._own))
        return found

    def _free(self, key: int, size: int, own: bool, _: Any) -> None:
        if self._held.pop(key, None) is not None:
            self._count(-size, own)

    def _count(self, size: int, own: bool) -> None:
        added = _Bytes(size, size if abs(size) < MAPPED_AT_MOST else 0)
        self._all = self._all.plus(added)
        self._own = self._own.plus(added) if own else self._own

    def _settle(self) -> None:
        if self._due:
            self._due = False
            self._left = self._own
            self._close()

    def _close(self) -> None:
        self._moments += [(every, own.least(self._left)) for every, own in self._open]
        self._open.clear()


class _Bytes(NamedTuple):
    """Of all storages, and of those that a CPU's heap has room for: larger ones are mapped one by one."""

    every: int = 0
    small: int = 0

    def plus(self, other: _Bytes, times: int = 1) -> _Bytes:
        return _Bytes(self.every + times * other.every, self.small + times * other.small)

    def least(self, other: _Bytes) -> _Bytes:
        return _Bytes(min(self.every, other.every), min(self.small, other.small))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    # What oneDNN has laid out for itself does not tell its size.
    if isinstance(value, torch.Tensor):
        if not value.is_mkldnn:
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
