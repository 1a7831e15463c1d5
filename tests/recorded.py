"""A CUDA graph on a CPU: what is recorded runs again on the very same tensors, and recording reads nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What an operator returns depends on values, so CUDA would have to wait.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def is_read(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host has to wait for values; indices wait only if they are masks."""
    if func is torch.ops.aten._to_copy.default:
        # Only a tensor of `tests/fake_cuda` can leave the card.
        return hasattr(args[0], "held") and str(kwargs.get("device")) == "cpu"
    if func.overloadpacket in INDEXING:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool(READING & set(func.tags))


def place(tensor: Any) -> int:
    """Where a tensor lies; one of `tests/fake_cuda` holds another."""
    found: int = getattr(tensor, "held", tensor).data_ptr()
    return found


class Graph:
    """Stands for torch.cuda.CUDAGraph; `replays` counts."""

    made: list[Graph] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, found in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and place(old) != place(new):
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Notes what is called. As nothing runs while CUDA records, what was changed is put back."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_read(func, args, kwargs):
            raise RuntimeError(f"{func} is not permitted when a stream is capturing")
        named = [*zip(func._schema.arguments, args, strict=False)]
        named += [(known, kwargs[known.name]) for known in func._schema.arguments if known.name in kwargs]
        for known, value in named:
            if known.alias_info is not None and known.alias_info.is_write and isinstance(value, torch.Tensor):
                self.before.append((value, value.clone()))
        found = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, found))
        return found


@contextlib.contextmanager
def recording(graph: Graph, pool: Any = None) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    recorder = Recorder(graph)
    try:
        with recorder:
            yield
    finally:
        for tensor, value in reversed(recorder.before):
            tensor.copy_(value)


# What torch.cuda has of graphs.
GRAPHS = {
    "CUDAGraph": Graph,
    "graph": recording,
    "graph_pool_handle": lambda: (0, 1),
    "synchronize": lambda *_: None,
}


@contextlib.contextmanager
def graphs_on_cpu() -> Iterator[list[Graph]]:
    """Inside, torch.cuda records on a CPU; gives the graphs made."""
    Graph.made = []
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in GRAPHS.items():
            patch.setattr(torch.cuda, name, answer)
        yield Graph.made
