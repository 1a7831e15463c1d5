"""Find an architecture's decoder blocks, and run the part of a model that starts at block k."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from midtune.errors import WHY, InputError, explained

KNOWN = "model such as Qwen, Llama, Mistral, Gemma 3, Phi-3 or SmolLM3"


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks by structure: a stack of equal modules, as many as the config has layers.

    Returns the stack's name inside `model` (`model.layers`) and the live stack; raises InputError if there is none.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != depth:
            continue
        inside = any(module is child for child in decoder.children())
        alike = len({type(block) for block in module}) == 1
        if inside and alike and any(isinstance(part, nn.Linear) for part in module[0].modules()):
            return name, module
    raise InputError(
        f"{type(model).__name__} has no stack of {depth} equal decoder blocks that midtune could recognise; "
        f"use a decoder-only {KNOWN}."
    )


class TailCache(DynamicCache):
    """Keys and values of blocks first…L−1 only, under those blocks' own layer numbers.

    An empty cache is written once. A cache made from `held`, [N, heads, P, D] for each block, never changes: a block
    reads it and its own keys and values, and `rows` [B] says which of the N prefixes each row continues. So in both
    cases a block may run on it again.
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


def tail_of(model: PreTrainedModel, stack_name: str, first: int, *, checkpointing: bool = False) -> nn.Module:
    """The inner model without its blocks below `first`: pass it their output as `inputs_embeds`.

    It shares every parameter with `model` and makes its own masks and positions, so sliding windows and rotary
    embeddings are the architecture's. Make a new one after replacing a block. With `checkpointing`, each block keeps
    only its inputs and runs again for the gradient.
    """
    inner_name, _, attribute = stack_name.rpartition(".")
    inner = model.get_submodule(inner_name)
    blocks: nn.ModuleList = getattr(inner, attribute)
    tail = copy.copy(inner)
    # copy.copy shares the dict of submodules; replacing an entry there would change the model itself.
    tail._modules = dict(inner._modules)
    parts = [_checkpointed(block) for block in blocks[first:]] if checkpointing else blocks[first:]
    setattr(tail, attribute, nn.ModuleList(parts))
    tail.config = config_from(inner.config, first, len(blocks))
    return tail


def _checkpointed(block: nn.Module) -> nn.Module:
    """A checkpointed view of a block; transformers' own checkpointing drops the cache."""
    view = copy.copy(block)
    view.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return view


class Reached(Exception):
    """Ends a forward pass at a block."""


@contextlib.contextmanager
def captured(
    block: nn.Module | None, *, stop: bool = False, storage: torch.device | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect the states [B, T, H] that enter `block` (None: nothing) in each forward pass, moved to `storage`.

    With `stop`, end each forward pass there by raising `Reached`.
    """
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
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


@torch.no_grad()
def check_tail(model: PreTrainedModel, stack_name: str) -> None:
    """Check that a tail's input reaches its block unchanged; raises InputError.

    Some architectures add positions to their inputs, scale them, or also need token ids.
    """
    last = len(model.get_submodule(stack_name)) - 1
    width = model.config.get_text_config().hidden_size
    given = torch.linspace(-1, 1, width, dtype=model.dtype, device=model.device).view(1, 1, width)
    block = model.get_submodule(f"{stack_name}.{last}")
    ones = torch.ones(1, 1, dtype=torch.long, device=model.device)
    refused = f"{type(model).__name__} cannot be run from a block in the middle ({WHY}); use a {KNOWN}."
    # An unknown architecture may raise anything.
    with explained(refused, keep=(torch.OutOfMemoryError,)), captured(block) as entered:
        forward = partial(tail_of(model, stack_name, last), inputs_embeds=given, attention_mask=ones)
        forward(position_ids=ones, past_key_values=TailCache(last), use_cache=True)
        if not torch.equal(entered[0], given):
            raise ValueError("it changes what it is given on the way to its blocks")


def config_from(config: Any, first: int, depth: int) -> Any:
    """Copy `config` for the blocks from `first` on, and cut its per-block lists to match."""
    cut = copy.copy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            vars(cut)[key] = value[first:]
    vars(cut)["num_hidden_layers"] = depth - first
    return cut
