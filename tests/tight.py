"""A device on which memory runs out: whatever takes too many rows fails as it does on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from midtune.model.policy import Policy


def anything(hidden: torch.Tensor) -> bool:
    return True


def prefill(hidden: torch.Tensor) -> bool:
    return hidden.size(1) > 1


@contextlib.contextmanager
def memory_for(
    policy: Policy, rows: int, during: Callable[[torch.Tensor], bool] = anything
) -> Iterator[list[int]]:
    """While inside, passes of more than `rows` rows through the last block fail; their rows are listed."""
    refused: list[int] = []

    def check(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if during(hidden) and len(hidden) > rows:
            refused.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = policy.blocks[-1].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield refused
    finally:
        hook.remove()
