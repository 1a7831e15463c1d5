"""Rotary embeddings of a decoded token by one product each for queries and keys: transformers launches ten kernels."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

# Under this name each of transformers' models has its own.
NAME = "apply_rotary_pos_emb"


def rotating_modules(model: nn.Module) -> list[ModuleType]:
    """The Python modules whose rotary embedding parts of the model call."""
    named = {type(part).__module__ for part in model.modules()}
    return [module for name in sorted(named) if hasattr(module := sys.modules[name], NAME)]


@contextlib.contextmanager
def rotated_by_products(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Inside, these modules rotate single tokens by a product, which pays on a card; no gradient is taken."""
    usual = [(module, getattr(module, NAME)) for module in modules]
    try:
        for module, function in usual:
            setattr(module, NAME, partial(_rotated, function))
        yield
    finally:
        for module, function in usual:
            setattr(module, NAME, function)


def _rotated(
    usual: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: Any,
    sin: Any,
    *others: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys [S, heads, 1, D] by cosines and sines [S, 1, ·], in which blocks share them."""
    width = q.size(-1)
    if others or named or q.dim() != 4 or q.size(2) != 1 or k.size(-1) != width:
        return usual(q, k, cos, sin, *others, **named)
    if not hasattr(cos, "rotation"):
        # A rotation is linear: the images of the unit vectors are its matrix. The first block makes it for all.
        units = torch.eye(width, dtype=q.dtype, device=q.device)[:, None].expand(len(q), -1, 1, -1)
        cos.rotation = usual(units, units, cos, sin)[0].squeeze(2)
    return q.squeeze(2).matmul(cos.rotation)[:, :, None], k.squeeze(2).matmul(cos.rotation)[:, :, None]
