"""A key/value cache for rollouts: new tokens and leaving rows copy nothing that is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer


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

    def join(self, others: Sequence[Any]) -> None:
        """Append the rows of other layers; shorter ones are padded on the left."""
        if self.is_initialized:
            parts = [self, *others]
            longest = max(part.keys.size(2) for part in parts)
            self.keys, self.values = (
                torch.cat([F.pad(part, (0, 0, longest - part.size(2), 0)) for part in held])
                for held in ([part.keys for part in parts], [part.values for part in parts])
            )
            self._keys, self._values = self.keys, self.values

    def select_tokens(self, order: torch.Tensor) -> None:
        """Token i of row b becomes what its token `order[b, i]` was; `order` is [B, T]."""
        chosen = order[:, None, :, None]
        self.keys, self.values = (
            held.gather(2, chosen.expand(-1, held.size(1), -1, held.size(3)))
            for held in (self.keys, self.values)
        )
        self._keys, self._values = self.keys, self.values


class StateLayer(LinearAttentionLayer):
    """Recurrent and convolution states of one block, a row each [B, …]."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda name, number, states: states.index_select(0, indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda name, number, states: states.repeat_interleave(repeats, 0))

    def join(self, others: Sequence[Any]) -> None:
        """Append the rows of other layers."""
        self._change(
            lambda name, number, states: torch.cat([states, *(vars(other)[name][number] for other in others)])
        )

    def _change(self, change: Callable[[str, int, torch.Tensor], torch.Tensor]) -> None:
        for name in ("conv_states", "recurrent_states"):
            for number, states in vars(self)[name].items():
                if states is not None:
                    vars(self)[name][number] = change(name, number, states)


class HybridLayer(StateLayer, RoomyLayer):
    """Keys and values beside recurrent states, in one block."""

    is_compileable = False

    def __init__(self, room: int, number_of_states: int = 1) -> None:
        RoomyLayer.__init__(self, room)
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Keys and values come as two positional arguments, states by name.
        (RoomyLayer if args else StateLayer).lazy_initialization(self, *args, **kwargs)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        StateLayer.batch_select_indices(self, indices)
        RoomyLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        StateLayer.batch_repeat_interleave(self, repeats)
        RoomyLayer.batch_repeat_interleave(self, repeats)

    def join(self, others: Sequence[Any]) -> None:
        StateLayer.join(self, others)
        RoomyLayer.join(self, others)


def with_states(config: Any, room: int) -> Cache:
    """An empty cache of the layers that a model's configuration names, which keep every key."""
    layers: list[Any] = []
    for kind in DynamicCache(config=config).layers:
        attends, recurs = isinstance(kind, DynamicLayer), isinstance(kind, LinearAttentionLayer)
        if attends and recurs:
            layers.append(HybridLayer(room, kind.number_of_states))
        elif recurs:
            layers.append(StateLayer(kind.number_of_states))
        else:
            layers.append(RoomyLayer(room) if attends else kind)
    return Cache(layers=layers)


def joined(caches: Sequence[Cache]) -> Cache:
    """The rows of several caches in one, shorter ones padded on the left."""
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        if others and hasattr(layer, "join"):
            layer.join(others)
    return caches[0]


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
