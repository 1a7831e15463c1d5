"""Memory of sampling and of the update, by running their code on a model without data.

Memory grows by the same amount with each block, so a model of three or four blocks predicts a deep one.
midtune's phases run midtune's own code; TRL's phases run the model and the chunked head that TRL runs.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, LogitsProcessorList

from midtune.bench.flops import Batch
from midtune.bench.workload import ARMS, qlora
from midtune.model.blocks import cache_argument, find_blocks
from midtune.model.sizes import blocks_of
from midtune.planning.budget import Held, Loaded
from midtune.planning.skeleton import SkeletonPolicy, chunked_log_probs, skeleton
from midtune.planning.tracker import Tracker
from midtune.rl import tail
from midtune.rollout.boundary import BoundaryStates, positions
from midtune.rollout.decoding import choose
from midtune.rollout.sampling import Rollout
from midtune.rollout.slots import NotInSlots, Pass, Seats, Slots, bucket, windows_of

# Chunks of the head that a trace runs; all are alike.
FEW_CHUNKS = 4
# Blocks that a trace runs: the trained ones (or the first), one that stands for all others, and the last.
FEW_BLOCKS = 3


def block_update(model: Loaded, batch: Batch, *, tail_blocks: int, trained: int, **settings: Any) -> Held:
    """midtune's update of a micro-batch, from boundary states to preallocated gradients.

    `tail_blocks` counts from the first trained block on; which others are trained makes no difference. `settings` are
    the `kind` of tail (default: `SHARED`), and arguments of `completion_log_probs`.
    """
    built = min(tail_blocks, trained + FEW_BLOCKS - 1)
    return _block_update(model, batch, built, trained, **settings).held(tail_blocks - built)


@functools.cache
def _block_update(
    model: Loaded, batch: Batch, depth: int, trained: int, kind: str = tail.SHARED, **settings: Any
) -> Tracker:
    prompt_tokens, new_tokens = int(batch.prompt_tokens), int(batch.new_tokens)
    chunk = settings.get("chunk_values", tail.CHUNK_VALUES)
    # A chunk has a fixed number of logits, so a smaller vocabulary only means more tokens per chunk.
    vocabulary = max(1, FEW_CHUNKS * chunk // (batch.rows * new_tokens))
    own = model.config.get_text_config().vocab_size
    policy = SkeletonPolicy(model, depth, trained, min(vocabulary, own), kind)
    hidden = policy.model.config.get_text_config().hidden_size
    prompt_mask = torch.ones(batch.prompts, prompt_tokens, dtype=torch.long)
    completion_mask = torch.ones(batch.rows, new_tokens, dtype=torch.long)
    with policy.mode:
        states = [
            torch.empty(*mask.shape, hidden, dtype=model.dtype) for mask in (prompt_mask, completion_mask)
        ]
    rollout = Rollout(
        torch.zeros_like(prompt_mask),
        prompt_mask,
        torch.zeros_like(completion_mask),
        completion_mask,
        torch.zeros(completion_mask.shape),
        torch.zeros(completion_mask.shape),
        torch.zeros(batch.rows, dtype=torch.bool),
        BoundaryStates(0, *states),
    )
    _give_gradients(policy.model)
    with Tracker([*_there(policy.model), *states, rollout.prompt_mask, rollout.completion_mask]) as tracker:
        with tracker.repeated(policy.blocks, trained):
            log_probs, _ = tail.completion_log_probs(policy, rollout, temperature=1.0, **settings)
        tracker.keep()
        log_probs.mean().backward()
    return tracker


def whole_update(model: Loaded, batch: Batch, arm: str, block: int = 0) -> Held:
    """TRL's update of a micro-batch, with every prompt repeated for each completion; `trl-block` trains `block`."""
    prompt_tokens, new_tokens = int(batch.prompt_tokens), int(batch.new_tokens)
    # Nothing is kept below a block that is trained alone.
    alone = ARMS[arm].trains == "blocks"
    depth = blocks_of(model.config) - (block if alone else 0)
    built = min(depth, FEW_BLOCKS)
    if alone:
        policy = SkeletonPolicy(model, built, trained=1)
        held, mode = policy.model, policy.mode
    else:
        held, mode = skeleton(model, built)
    if ARMS[arm].trains == "adapters":
        _add_lora(held, mode)
    if ARMS[arm].checkpointing:
        held.activation_checkpointing_enable()
    held.train()
    with mode:
        _give_gradients(held)
    ones = torch.ones(batch.rows, prompt_tokens + new_tokens, dtype=torch.long)
    # On a card TRL scores only completions; elsewhere every position.
    scored = slice(prompt_tokens - 1 if model.on_card else 0, -1)
    with Tracker([*_there(held), ones]) as tracker:
        with _mixed(model.dtype), tracker.repeated(find_blocks(held)[1], 1):
            states = held.base_model(
                input_ids=torch.zeros_like(ones), attention_mask=ones, use_cache=False
            ).last_hidden_state[:, scored]
            states = states.reshape(-1, states.size(-1))
        entering = states.detach().requires_grad_()
        with _mixed(model.dtype):
            log_probs = chunked_log_probs(held.get_output_embeddings(), entering, on_card=model.on_card)
        tracker.keep()
        log_probs.mean().backward()
        states.backward(entering.grad)
    return tracker.held(depth - built)


@functools.cache
@torch.no_grad()
def sampling(model: Loaded, batch: Batch, *, shared: bool) -> Held:
    """Keys and values of sampling all rows at once, and the peak: traces the prompt pass and the last step.

    With `shared`, as in midtune, each prompt passes once and is held once, and rows have slots, where the model allows.
    """
    if shared:
        with contextlib.suppress(NotInSlots):
            windows_of(model.config)
            return _sampling(model, batch, shared=True)
    return _sampling(model, batch, shared=False)


def _sampling(model: Loaded, batch: Batch, *, shared: bool) -> Held:
    prompt_tokens = int(batch.prompt_tokens)
    depth = blocks_of(model.config)
    built = min(depth, FEW_BLOCKS)
    held, mode = skeleton(model, built)
    held.eval()
    prompts = batch.prompts if shared else batch.rows
    ones = torch.ones(prompts, prompt_tokens, dtype=torch.long)
    with (
        Tracker([*_there(held), ones]) as tracker,
        _mixed(model.dtype),
        tracker.repeated(find_blocks(held)[1], 1),
    ):
        cache = DynamicCache(config=held.config.get_text_config())
        held(
            input_ids=torch.zeros_like(ones),
            attention_mask=ones,
            position_ids=positions(ones),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(held): cache},
        )
        last = _last_step_in_slots if shared else _last_step
        logits = last(held, mode, tracker, cache, batch)
        choose(logits.float(), 1.0, LogitsProcessorList(), torch.zeros(batch.rows))
    return tracker.held(depth - built)


def _last_step(held: Any, mode: Any, tracker: Tracker, cache: Any, batch: Batch) -> torch.Tensor:
    """Transformers' last step, whose keys and values are copied for every token."""
    new_tokens = int(batch.new_tokens)
    for number, layer in enumerate(cache.layers):
        with tracker.made_by_repeated() if number == 1 else contextlib.nullcontext():
            if not hasattr(layer, "keys"):
                # A recurrent state does not grow.
                continue
            rows, heads, _, width = layer.keys.shape
            with mode:
                shape = (rows, heads, max(new_tokens - 2, 0), width)
                drawn = [torch.empty(shape, dtype=layer.keys.dtype) for _ in range(2)]
            layer.update(*drawn)
            del drawn
    tracker.keep()
    ones = torch.ones(batch.rows, int(batch.prompt_tokens) + new_tokens - 1, dtype=torch.long)
    found: torch.Tensor = held(
        input_ids=torch.zeros(batch.rows, 1, dtype=torch.long),
        attention_mask=ones,
        position_ids=positions(ones)[:, -1:],
        use_cache=True,
        **{cache_argument(held): cache},
    ).logits
    return found[:, -1]


def _last_step_in_slots(held: Any, mode: Any, tracker: Tracker, cache: Any, batch: Batch) -> torch.Tensor:
    """The engine's last step, after the slots have widened once."""
    size, rows = batch.group_size, bucket(batch.rows)
    slots = Slots(held)
    columns = bucket(max(int(batch.new_tokens), 1))
    before, order = columns // 4 * 3, torch.arange(rows)
    for number, (layer, filled) in enumerate(zip(slots.layers, cache.layers, strict=True)):
        with tracker.made_by_repeated() if number == 1 else contextlib.nullcontext():
            layer.put([*range(batch.prompts)], (filled.keys, filled.values), filled.keys.dtype)
            filled.keys = filled.values = None
            layer.keep_slots(order, max(before, 1))
    for number, layer in enumerate(slots.layers):
        with tracker.made_by_repeated() if number == 1 else contextlib.nullcontext():
            layer.keep_slots(order, columns)
    tracker.keep()
    prompt = order.clamp(max=batch.rows - 1) // size
    mask = torch.ones(batch.prompts, int(batch.prompt_tokens), dtype=torch.long)
    members = torch.arange(batch.prompts * size).view(-1, size)
    seats = Seats(prompt, order % size, members, mask, positions(mask), mask.sum(1)[prompt])
    last = torch.full((rows, 1), columns - 1)
    return slots.feed(torch.zeros(rows, 1, dtype=torch.long), Pass(seats, last, last, columns))


def _add_lora(model: Any, mode: FakeTensorMode) -> None:
    """Put PEFT's LoRA on every linear layer, in place, in bf16 as TRL casts it."""
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(qlora(), model, low_cpu_mem_usage=True)
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.requires_grad:
                with mode:
                    setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16)))


def _there(model: Any) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*model.parameters(), *gradients, *model.buffers()]


def _give_gradients(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def _mixed(dtype: torch.dtype) -> Any:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
