"""Keys and values of a decode step whose shapes stay the same, and the attention that reads them.

A prompt's keys and values are held once for its whole group. A row's own tokens lie in a slot, in order from its first
column; the last column takes what belongs to nobody. Attention reads the two parts apart and merges them exactly,
because each part also gives the logarithm of its softmax's denominator. Query heads that share a key head are queries
of one product, so keys are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from midtune.model.blocks import cache_argument
from midtune.model.rotary import NAME, rotations

# The name under which transformers finds `attend`.
IN_SLOTS = "midtune_slots"
# Added to the scores of keys that a query must not see. Finite, so that a part with no other key gets the weight 0.
HIDDEN = {torch.float32: -1e30, torch.bfloat16: -1e30, torch.float16: -3e4}
# CUDA's kernel wants rows of a mask to begin at a multiple of this.
ALIGNED = 16
# Own and shared part, as masks or as stored tensors.
Parts = tuple[torch.Tensor, torch.Tensor]


class NotInSlots(Exception):
    """This architecture's attention cannot be computed from slots."""


def bucket(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is at least `count`."""
    power = 1 << max(count - 1, 0).bit_length()
    between = power // 4 * 3
    return between if power >= 4 and count <= between else power


@dataclass
class Seats:
    """Which slots continue which prompts: up to G of S slots continue each of N prompts."""

    prompt: torch.Tensor  # [S], the slot's prompt
    seat: torch.Tensor  # [S], its place among the slots of this prompt
    members: torch.Tensor  # [N, G], the slots of each prompt, and any slot where it has fewer
    mask: torch.Tensor  # [N, P], 1 on the prompts' tokens
    positions: torch.Tensor  # [N, P]
    lengths: torch.Tensor  # [S], tokens of the slot's prompt


@dataclass
class Pass:
    """A forward pass that feeds T tokens to each of S slots of C columns."""

    seats: Seats
    columns: torch.Tensor  # [S, T], where the tokens' keys and values go
    last: torch.Tensor  # [S, T], the last column that each token sees
    width: int  # C
    _masks: dict[int | None, Parts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.columns), device=self.columns.device)[:, None]
        self.positions = self.seats.lengths[:, None] + self.last

    def masks(self, window: int | None, heads: int, dtype: torch.dtype) -> Parts:
        """What is added to scores: of own keys, [S, 1, heads·T or 1, C], and of prompts, [N, 1, G·heads·T or 1, P].

        `heads` query heads share a key head.
        """
        if window not in self._masks:
            seats, last = self.seats, self.last[..., None]
            column = torch.arange(self.width, device=last.device)
            own, shared = column <= last, seats.mask[:, None].bool()
            if window is not None:
                own = own & (column > last - window)
                ahead = self.positions[seats.members][..., None] - seats.positions[:, None, None]
                seen = shared[:, None] & (ahead < window)  # [N, G, T, P]
                shared = seen[:, :, None].expand(-1, -1, heads, -1, -1).flatten(1, 3)
            if last.size(1) > 1:
                own = own[:, None].expand(-1, heads, -1, -1).flatten(1, 2)
            self._masks[window] = _added(own[:, None], dtype), _added(shared[:, None], dtype)
        return self._masks[window]


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    width = seen.size(-1)
    shape = (*seen.shape[:-1], -(-width // ALIGNED) * ALIGNED)
    return torch.full(shape, HIDDEN[dtype], dtype=dtype, device=seen.device)[..., :width].masked_fill_(
        seen, 0
    )


class SlotLayer(DynamicLayer):
    """One block's keys and values: of prompts [N, heads, P, D] and of slots [S, heads, C, D]."""

    def __init__(self, slots: Slots, window: int | None) -> None:
        super().__init__()
        self.slots, self.window = slots, window
        self.shared: Parts | None = None
        self.own: Parts | None = None
        # Whether `attend` has read what the last pass wrote.
        self.read = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the pass's tokens, and return the slots' keys, which tell `attend` of their layer."""
        assert self.own is not None
        passing = self.slots.passing
        for held, new in zip(self.own, (key_states, value_states), strict=True):
            held[passing.rows, :, passing.columns] = new.transpose(1, 2).to(held.dtype)
        keys, values = (held.view_as(held) for held in self.own)
        keys.layer, self.read = self, False  # type: ignore[attr-defined]
        return keys, values

    def put(self, places: list[int], prompts: Parts, dtype: torch.dtype) -> None:
        """Hold the keys and values of prompts [n, heads, P, D] at some places; the first come at 0…n−1."""
        prompts = tuple(part.to(dtype) for part in prompts)  # type: ignore[assignment]
        if self.shared is None:
            self.shared = prompts
        else:
            where = torch.tensor(places, device=prompts[0].device)
            for held, new in zip(self.shared, prompts, strict=True):
                held[where] = new

    def keep_prompts(self, order: torch.Tensor) -> None:
        """Prompt i becomes what prompt `order[i]` was."""
        assert self.shared is not None
        keys, values = self.shared
        self.shared = keys[order], values[order]

    def keep_slots(self, order: torch.Tensor, width: int) -> None:
        """Slot i becomes what slot `order[i]` was, with `width` columns; the first call makes the slots."""
        made = []
        for place, prompts in enumerate(self.shared or ()):
            _, heads, _, size = prompts.shape
            found = prompts.new_zeros(len(order), heads, width, size)
            if self.own is not None:
                held = self.own[place]
                columns = min(held.size(2), width) - 1
                found[:, :, :columns] = held[order][:, :, :columns]
            made.append(found)
        self.own = made[0], made[1]


def windows_of(config: Any) -> list[int | None]:
    """Each block's attention window; raises NotInSlots for a model with other states than keys and values."""
    kinds = DynamicCache(config=config.get_text_config()).layers
    if any(type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer) for kind in kinds):
        raise NotInSlots("it holds other states than keys and values")
    return [getattr(kind, "sliding_window", None) for kind in kinds]


class Slots(Cache):
    """The layers of all blocks; raises NotInSlots as `windows_of`."""

    passing: Pass

    def __init__(self, model: Any) -> None:
        super().__init__(layers=[SlotLayer(self, window) for window in windows_of(model.config)])
        self._model, self._argument = model, cache_argument(model)
        # A block that is trained has its own.
        configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
        # Objects, names of their attributes, usual values, and those in a pass. Products pay on a card alone.
        self._replaced = [
            *((c, "_attn_implementation", c._attn_implementation, IN_SLOTS) for c in configs.values()),
            *((module, NAME, *both) for module, *both in rotations(model) if model.device.type == "cuda"),
        ]

    def feed(self, ids: torch.Tensor, passing: Pass) -> torch.Tensor:
        """Feed tokens [S, T] → the logits of the last column, [S, V]."""
        self.passing = passing
        try:
            for part, name, _, ours in self._replaced:
                setattr(part, name, ours)
            found: torch.Tensor = self._model(
                input_ids=ids,
                position_ids=passing.positions,
                use_cache=True,
                logits_to_keep=1,
                **{self._argument: self},
            ).logits
        finally:
            for part, name, usual, _ in self._replaced:
                setattr(part, name, usual)
        if not all(layer.read for layer in self.layers):
            raise NotInSlots("its attention is of its own kind")
        return found[:, -1]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries [S, H, T, D] to their slots and prompts → [S, T, H, D], as transformers calls it.

    `s_aux` [H] are sinks: scores without a value. Raises NotInSlots if the model asks for something else.
    """
    layer: SlotLayer | None = getattr(key, "layer", None)
    if layer is None or layer.shared is None or others.get("softcap") is not None:
        raise NotInSlots("its attention is of its own kind")
    layer.read = True
    if layer.window != sliding_window:
        raise NotInSlots("its attention window is not the one that its configuration names")
    seats = layer.slots.passing.seats
    slots, heads, tokens, size = query.shape
    key_heads = key.size(1)
    scale = size**-0.5 if scaling is None else scaling
    own_mask, shared_mask = layer.slots.passing.masks(layer.window, heads // key_heads, key.dtype)
    packed = query.reshape(slots, key_heads, -1, size).to(key.dtype)
    own, own_total = _attention(packed, key, value, own_mask, scale)
    # Members lie next to each other, so that a prompt's queries are rows of one product.
    grouped = packed.transpose(0, 1)[:, seats.members].transpose(0, 1).flatten(2, 3)
    shared, shared_total = _attention(grouped, *layer.shared, shared_mask, scale)
    shared, shared_total = (
        part.unflatten(2, (seats.members.size(1), -1))[seats.prompt, :, seats.seat]
        for part in (shared, shared_total)
    )
    share = torch.sigmoid(shared_total - own_total)
    found = own.lerp(shared, share[..., None].to(own.dtype))
    if s_aux is not None:
        total = torch.logaddexp(shared_total, own_total)
        sinks = s_aux.view(1, key_heads, -1, 1).expand(-1, -1, -1, tokens).flatten(2)
        found = found * torch.sigmoid(total - sinks)[..., None].to(found.dtype)
    return found.view(slots, heads, tokens, -1).transpose(1, 2), None


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, L, D] and the logarithms of its denominators [B, heads, L], fp32."""
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    mask = mask.expand(*query.shape[:3], -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    found, totals, *_ = efficient(query, key, value, mask, True, 0.0, False, scale=scale)
    # The kernel rounds the number of queries up.
    return found, totals[..., : query.size(2)]


AttentionInterface.register(IN_SLOTS, attend)
