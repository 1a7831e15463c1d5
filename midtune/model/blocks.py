"""Find an architecture's decoder blocks, and run the part of a model that starts at block k."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from midtune.errors import InputError
from midtune.model.architectures import KNOWN


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks by structure: the largest stack of modules right inside the decoder.

    Its blocks may be of several kinds. Returns the stack's name inside `model` (`model.layers`) and the live stack;
    raises InputError if there is none.
    """
    # Some architectures name their head the decoder.
    inside = {id(child) for part in (model.get_decoder(), *model.children()) for child in part.children()}
    stacks = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside
    ]
    if stacks:
        name = max(stacks)[1]
        return name, cast(nn.ModuleList, model.get_submodule(name))
    raise InputError(
        f"{type(model).__name__} has no stack of decoder blocks that midtune could recognise; "
        f"use a decoder-only {KNOWN}."
    )


class TailCache(DynamicCache):
    """Keys and values of blocks first…L−1 only, under those blocks' own layer numbers.

    Masks ask for layer 0, and get the lengths of block `first`. An empty cache is written once. A cache made from
    `held`, [N, heads, P, D] for each block, never changes: a block reads it and its own keys and values, and `rows` [B]
    says which of the N prefixes each row continues. So in both cases a block may run on it again.
    """

    def __init__(
        self, first: int, held: Sequence[torch.Tensor] = (), rows: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        for layer, (keys, values) in enumerate(zip(held[::2], held[1::2], strict=True)):
            super().update(keys, values, layer)
        self.first, self.rows = first, rows

    def update(  # type: ignore[no-untyped-def]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = layer_idx - self.first
        if layer >= len(self.layers):
            return super().update(key_states, value_states, layer, *args, **kwargs)
        if self.rows is None:
            return key_states, value_states
        held: Any = self.layers[layer]
        # Plain indexing sums its gradient in no fixed order when several threads work.
        keys, values = (part.index_select(0, self.rows) for part in (held.keys, held.values))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def with_part(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """A view of `module` with `part` in the place of its submodule `name`; it shares everything else."""
    first, _, rest = name.partition(".")
    view = copy.copy(module)
    # copy.copy shares the dict of submodules; replacing an entry there would change the module itself.
    view._modules = dict(module._modules)
    own = view._modules[first]
    assert own is not None
    view._modules[first] = with_part(own, rest, part) if rest else part
    return view


def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    view = copy.copy(module)
    view.forward = forward
    return view


def _checkpointed(block: nn.Module) -> nn.Module:
    """A checkpointed view of a block; transformers' own checkpointing drops the cache."""
    return _with_forward(
        block, partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    )


def resumed(
    model: PreTrainedModel,
    stack_name: str,
    first: int,
    states: torch.Tensor | None,
    *,
    returned: int = 0,
    checkpointing: bool = False,
) -> nn.Module:
    """The model without its head, in which blocks below `first` do nothing and `states` [B, T, H] enter that one.

    Pass it token ids [B, T] and what else the model takes: the architecture's own code makes masks, positions and
    whatever it passes to its blocks. With states None, what leaves the blocks below enters block `first`, which is
    right for block 0. It shares every parameter with `model`; make a new one after replacing a block.

    Args:
        returned: how many values a block returns as a tuple; 0 if a tensor; see `returned_by`.
        checkpointing: each block keeps only its inputs and runs again for the gradient.
    """
    body_name, _, place = stack_name.partition(".")
    blocks: Any = model.get_submodule(stack_name)

    def skip(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (returned - 1)) if returned else hidden_states

    def enter(*args: Any, **kwargs: Any) -> Any:
        name, own = entering(args, kwargs)
        given = own if states is None else states
        if given.dim() < own.dim():
            given = given.unflatten(-1, (-1, own.size(-1))).movedim(2, 0)
        return after[0](given, *args[1:], **kwargs) if args else after[0](**{**kwargs, name: given})

    after = [_checkpointed(block) if checkpointing else block for block in blocks[first:]]
    parts = [_with_forward(block, skip) for block in blocks[:first]]
    parts += [_with_forward(blocks[first], enter), *after[1:]]
    return with_part(model.get_submodule(body_name), place, nn.ModuleList(parts))


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model takes its cache."""
    known = inspect.signature(type(model).forward).parameters
    return next((name for name in ("cache", "cache_params") if name in known), "past_key_values")


@torch.no_grad()
def returned_by(model: PreTrainedModel, block: nn.Module) -> int:
    """How many values a block returns as a tuple; 0 if it returns a tensor."""
    found = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple) else 0)
        raise Reached

    hook = block.register_forward_hook(note)
    try:
        with contextlib.suppress(Reached):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        hook.remove()
    return found[0]


class Given:
    """What a model without its head returns: hidden states [B, T, H], and None for all else that may be asked for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> torch.Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def logits_of(model: PreTrainedModel, stack_name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the states [T, H] that leave the last norm: the architecture's own code scales and caps them."""
    view: nn.Module = copy.copy(model)
    # Trainers wrap the model's forward in place, bound to the model itself.
    vars(view).pop("forward", None)
    place = ""
    for name in stack_name.split(".")[:-1]:
        place = f"{place}.{name}".lstrip(".")
        view = with_part(
            view, place, _with_forward(view.get_submodule(place), lambda *_, **__: Given(hidden[None]))
        )
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    logits: torch.Tensor = view(input_ids=ids, use_cache=False).logits
    return logits[0]


class Reached(Exception):
    """Ends a forward pass at a block."""


def entering(args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """The hidden states among a block's arguments, and the name under which they are passed."""
    return ("", args[0]) if args else ("hidden_states", kwargs["hidden_states"])


@contextlib.contextmanager
def captured(
    block: nn.Module | None, *, stop: bool = False, storage: torch.device | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect the states [B, T, H] that enter `block` (None: nothing) in each forward pass, moved to `storage`.

    With `stop`, end each forward pass there by raising `Reached`.
    """
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        _, state = entering(args, kwargs)
        if state.dim() == 4:
            # Several streams, [A, B, T, H], are kept as one of their joint width.
            state = state.movedim(0, 2).flatten(2)
        states.append(state if storage is None else state.to(storage))
        if stop:
            raise Reached

    if block is None:
        yield states
        return
    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield states
    finally:
        hook.remove()


def config_from(config: Any, first: int, depth: int) -> Any:
    """Copy the configuration of a model of `depth` blocks for those from `first` on, with what it says of each."""
    cut = copy.copy(config)
    text = config.get_text_config()
    if text is not config:
        place = next(key for key, value in vars(config).items() if value is text)
        vars(cut)[place] = config_from(text, first, depth)
        return cut
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            vars(cut)[key] = value[first:]
    vars(cut)["num_hidden_layers"] = depth - first
    if vars(cut).get("num_kv_shared_layers"):
        # Blocks whose keys and values others share may be missing; so each has its own.
        vars(cut)["num_kv_shared_layers"] = 0
    overrides = config.to_dict().get("per_layer_config") or {}
    cut.per_layer_config = {int(k) - first: own for k, own in overrides.items() if int(k) >= first} or None
    return cut
