"""What keeps a card from waiting for the host: steps recorded and replayed by one call, and reads that lag behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Replayed:
    """Calls a step, which must always read and write the same tensors; on a card, records it and replays the record.

    The first call of a new step warms it up, the second records it. If recording fails, steps are called plainly
    from then on, and `on_message` is told once.
    """

    def __init__(self, on_message: Callable[[str], None] | None = None) -> None:
        self._on_message = on_message
        self._warm, self._fails = False, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool: Any = None
        self._result: Any = None

    def forget(self) -> None:
        """The next step is another one."""
        if self._graph is not None:
            # The card may still be at the last replay.
            torch.cuda.synchronize()
        self._warm, self._graph, self._result = False, None, None

    def __call__(self, step: Callable[[], Any]) -> Any:
        if self._graph is None:
            if not self._warm or self._fails:
                self._warm = True
                return step()
            self._record(step)
            if self._graph is None:
                return step()
        self._graph.replay()
        # The next replay writes over the result.
        return None if self._result is None else tuple(part.clone() for part in self._result)

    def _record(self, step: Callable[[], Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._result = step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (an architecture may do anything that cannot be recorded)
            self._fails = True
            if self._on_message is not None:
                self._on_message(
                    f"decode steps are not recorded ({error}); sampling goes on without, slower."
                )
            return
        self._graph = graph


class OnItsWay:
    """A tensor that is being copied to the host, which goes on meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def tolist(self) -> Any:
        """Its values; waits until they are there."""
        self._there.synchronize()
        return self._host.tolist()
