"""Rotary embeddings of decoded tokens by two products, where transformers launches ten kernels."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

# Under this name each of transformers' models has its own.
NAME = "apply_rotary_pos_emb"


def rotations(model: nn.Module) -> list[tuple[ModuleType, Any, Any]]:
    """Python modules that rotate for the model, with what they call for it and what does the same by products."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    found = [(module, getattr(module, NAME)) for module in modules if hasattr(module, NAME)]
    return [(module, usual, partial(_rotated, usual)) for module, usual in found]


def _rotated(
    usual: Any, q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, *more: Any, **named: Any
) -> Any:
    """Rotate queries and keys [S, heads, 1, D] by what all blocks share, `cos` and `sin` [S, 1, ·]."""
    if more or named or q.dim() != 4 or q.size(2) != 1 or k.size(-1) != q.size(-1):
        return usual(q, k, cos, sin, *more, **named)
    if not hasattr(cos, "rotation"):
        # A rotation is linear, so the images of the unit vectors are its matrix.
        units = torch.eye(q.size(-1), dtype=q.dtype, device=q.device)[:, None].expand(len(q), -1, 1, -1)
        cos.rotation = usual(units, units, cos, sin)[0].squeeze(2)
    return tuple(part.squeeze(2).matmul(cos.rotation)[:, :, None] for part in (q, k))
