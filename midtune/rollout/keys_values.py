"""A key/value cache for rollouts: new tokens and leaving rows copy nothing that is held."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, D] of one block, views of larger tensors with `room` spare tokens.

    Transformers' dynamic layer copies everything for each new token and for every dropped row.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = key_states, value_states
            end = key_states.size(2)
        else:
            start, end = self.keys.size(2), self.keys.size(2) + key_states.size(2)
            if end > self._keys.size(2):
                self._keys, self._values = (_with_room(x, end + self.room) for x in (self.keys, self.values))
            rows = key_states.size(0)
            self._keys[:rows, :, start:end] = key_states
            self._values[:rows, :, start:end] = value_states
        self.keys, self.values = (x[: key_states.size(0), :, :end] for x in (self._keys, self._values))
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows, _, tokens, _ = self.keys.shape
        self._keys, self._values = (
            _with_room(x[:, None].expand(-1, repeats, -1, -1, -1).flatten(0, 1), tokens + self.room)
            for x in (self.keys, self.values)
        )
        self.keys, self.values = (x[: rows * repeats, :, :tokens] for x in (self._keys, self._values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was; copies only rows that change place."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for held in (self.keys, self.values):
            held[moved] = held[indices[moved]]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    def select_tokens(self, order: torch.Tensor) -> None:
        """Token i of row b becomes what its token `order[b, i]` was; `order` is [B, T]."""
        rows, heads, _, width = self.keys.shape
        chosen = order[:, None, :, None].expand(rows, heads, -1, width)
        self.keys, self.values = (held.gather(2, chosen) for held in (self.keys, self.values))
        self._keys, self._values = self.keys, self.values


def shared_prompts(room: int) -> Cache:
    """An empty cache of `RoomyLayer`s that keeps every key; the mask then applies a window exactly."""
    return Cache(layer_class_to_replicate=partial(RoomyLayer, room))


def closed_up(going: torch.Tensor) -> torch.Tensor:
    """Indices for `batch_select_indices` that keep the rows `going` [B] bool: end rows fill the free places."""
    count = int(going.sum())
    kept = torch.arange(count, device=going.device)
    kept[~going[:count]] = going[count:].nonzero()[:, 0] + count
    return kept


def _with_room(held: torch.Tensor, tokens: int) -> torch.Tensor:
    """Copy `held` [B, heads, T, D] into a tensor with room for `tokens` tokens."""
    rows, heads, length, width = held.shape
    roomy = held.new_empty(rows, heads, tokens, width)
    roomy[:, :, :length] = held
    return roomy
