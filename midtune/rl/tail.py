"""Log-probabilities of completions from boundary states, through only blocks k…L−1 and the head.

Each prompt passes once; its group shares its keys and values, with their gradient. Completions pass in packs of
similar length, to keep padding small. Logits are made once, one chunk of tokens at a time, so [B, T, V] never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from midtune.config import TrainingConfig
from midtune.errors import InputError
from midtune.model.architectures import KNOWN
from midtune.model.blocks import TailCache, captured
from midtune.model.memory import is_out_of_memory
from midtune.model.policy import Policy, full_precision
from midtune.rollout.boundary import (
    MOST_APART,
    BoundaryStates,
    boundary_of,
    plain_log_probs,
    positions,
    whole_rows,
)
from midtune.rollout.engine import checked_rows
from midtune.rollout.sampling import Rollout, padded

# Values in one chunk's logits: 64 MiB in fp32 on a CPU, which needs new pages for every tensor, so that more is slower.
# A card reads the whole head for each chunk, which with few tokens takes longer than the product.
CHUNK_VALUES, CHUNK_VALUES_ON_CARD = 2**24, 2**26
# Share of a pack's tokens that may be padding.
MOST_PADDING = 0.15


def tail_settings(training: TrainingConfig, *, on_card: bool) -> dict[str, Any]:
    """The arguments of `completion_log_probs` that settings and device decide, in training and in a plan."""
    chunk = CHUNK_VALUES_ON_CARD if on_card else CHUNK_VALUES
    return {
        "recompute_tokens": training.micro_batch_tokens if training.recompute else 0,
        "chunk_values": chunk,
    }


def completion_log_probs(
    policy: Policy,
    rollout: Rollout,
    *,
    temperature: float,
    entropy_gradient: bool = False,
    recompute_tokens: int = 0,
    chunk_values: int = CHUNK_VALUES,
    most_padding: float = MOST_PADDING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of every completion token, and entropy of its distribution.

    Both are fp32 [N·G, C], 0 on padding and on tokens the policy did not sample.

    Args:
        rollout: whole groups, with boundary states.
        entropy_gradient: let the gradient reach the trained blocks through the entropies too.
        recompute_tokens: keep only the activations that enter each block and recompute the rest in the backward
            pass, in packs of at most this many tokens, prompts included; 0 keeps all.
        chunk_values: most logits that exist at a time.
        most_padding: as for `packs`.
    """
    assert rollout.boundary is not None
    kind = tail_kind(policy, rollout.boundary.block)
    recompute_tokens = recompute_tokens if torch.is_grad_enabled() else 0
    with policy.autocast():
        hidden, place = TAILS[kind](policy, rollout, recompute_tokens, most_padding)
        found = token_log_probs(
            policy,
            hidden,
            rollout.completion_ids.flatten()[place],
            temperature,
            entropy_gradient=entropy_gradient,
            chunk_values=chunk_values,
        )
    empty = torch.zeros(rollout.completion_ids.numel(), device=place.device)
    log_probs, entropies = (
        empty.index_copy(0, place, part).view_as(rollout.completion_ids) for part in found
    )
    return log_probs, entropies


def _on_shared_prompts(
    policy: Policy, rollout: Rollout, recompute_tokens: int, most_padding: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [S, H] that predict the scored tokens, and these tokens' places; prompts pass once."""
    states = rollout.boundary
    assert states is not None
    recompute = recompute_tokens > 0
    lengths = rollout.completion_mask.sum(1)
    # Prompts of other micro-batches may be longer.
    start = int(rollout.prompt_mask.argmax(1).min())
    prompt_mask = rollout.prompt_mask[:, start:]
    prompt_of_row = _prompt_of_row(rollout)

    def run(ids: torch.Tensor, held: torch.Tensor, mask: torch.Tensor, cache: TailCache) -> torch.Tensor:
        # Trained embeddings need their gradient.
        entering = None if policy.whole else held.to(policy.device)
        found: torch.Tensor = policy.tail(states.block, entering, checkpointing=recompute)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, -ids.size(1) :],
            use_cache=True,
            **{policy.cache_argument: cache},
        )[0]
        return found

    def prompts() -> tuple[torch.Tensor, ...]:
        cache = TailCache(states.block)
        hidden = run(rollout.prompt_ids[:, start:], states.prompt[:, start:], prompt_mask, cache)[:, -1]
        return hidden, *(part for layer in cache.layers for part in (layer.keys, layer.values))

    def completions(rows: torch.Tensor, fed: int, shared: Sequence[torch.Tensor]) -> torch.Tensor:
        own = prompt_of_row[rows]
        mask = torch.cat([prompt_mask[own], rollout.completion_mask[rows, :fed]], 1)
        held = states.completion[rows.to(states.completion.device), :fed]
        return run(rollout.completion_ids[rows, :fed], held, mask, TailCache(states.block, shared, own))

    first, *shared = prompts()
    wanted = rollout.scored.bool()
    scored = wanted[:, 0]
    # The prompt's last token predicts the first one of each completion.
    hidden = [first.index_select(0, prompt_of_row[scored])]
    places = [scored.nonzero()[:, 0] * rollout.completion_ids.size(1)]
    # A completion's last token is not fed.
    most_rows = (lambda fed: recompute_tokens // (prompt_mask.size(1) + fed)) if recompute else None
    for rows in packs((lengths - 1).tolist(), most_padding, most_rows):
        pack = torch.tensor(rows, device=lengths.device)
        fed = int(lengths[pack].max()) - 1
        kept = wanted[pack, 1 : fed + 1]
        row, place = kept.nonzero().unbind(1)
        hidden.append(completions(pack, fed, shared)[row, place])
        places.append(pack[row] * rollout.completion_ids.size(1) + place + 1)
    return torch.cat(hidden), torch.cat(places)


def _on_whole_rows(
    policy: Policy, rollout: Rollout, recompute_tokens: int, most_padding: float, *, skip: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through the model's own forward pass, for prompts with their completions, without a cache.

    Padding is on the right, where no causal model sees it: nothing but token ids is passed. With `skip`, blocks below
    the boundary do nothing; otherwise they run, and so need no gradient.
    """
    states = rollout.boundary
    assert states is not None
    own = _prompt_of_row(rollout)
    prompt_lengths = rollout.prompt_mask.sum(1)[own]
    ids, order, lengths = whole_rows(rollout)
    wanted = rollout.scored.bool()
    most_rows = (lambda fed: recompute_tokens // fed) if recompute_tokens > 0 else None
    first = states.block if skip else 0
    hidden, places = [], []
    for rows in packs((lengths - 1).tolist(), most_padding, most_rows):
        pack = torch.tensor(rows, device=ids.device)
        fed = int(lengths[pack].max()) - 1
        entering = None
        # Trained embeddings need their gradient.
        if skip and not policy.whole:
            place = pack.to(states.prompt.device)
            held = torch.cat([states.prompt[own.to(place.device)[place]], states.completion[place]], 1)
            chosen = order[pack, :fed].to(held.device)
            entering = held.gather(1, chosen[..., None].expand(-1, -1, held.size(-1))).to(policy.device)
        tail = policy.tail(first, entering, checkpointing=recompute_tokens > 0)
        found = tail(input_ids=ids[pack, :fed], use_cache=False)[0]
        row, place = wanted[pack].nonzero().unbind(1)
        hidden.append(found[row, prompt_lengths[pack[row]] + place - 1])
        places.append(pack[row] * wanted.size(1) + place)
    return torch.cat(hidden), torch.cat(places)


Run = Callable[[Policy, Rollout, int, float], tuple[torch.Tensor, torch.Tensor]]
# How blocks from the boundary on may be run, fastest first; every model can be run whole.
SHARED, ROWS, WHOLE = "shared", "rows", "whole"
TAILS: dict[str, Run] = {
    SHARED: _on_shared_prompts,
    ROWS: _on_whole_rows,
    WHOLE: partial(_on_whole_rows, skip=False),
}
SLOWER = {
    ROWS: "The update repeats each prompt for all its completions, which is slower: blocks from {} on cannot share it.",
    WHOLE: "The update runs all blocks, which is slower: blocks from {} on also read what earlier ones keep.",
}


def tail_kind(policy: Policy, block: int) -> str:
    """The fastest of `TAILS` from `block` on that computes the log-probs of the plain model, which is tried once.

    Raises InputError if none does.
    """
    if block not in policy.tails:
        policy.tails[block] = _exact_tail(policy, block)
    return policy.tails[block]


def tail_note(policy: Policy) -> list[str]:
    """What to tell people of the update, if prompts cannot be shared in it."""
    block = policy.trained[0]
    return slower(tail_kind(policy, block), block)


def slower(kind: str, block: int) -> list[str]:
    """The same for a `kind` of tail from `block` on."""
    return [SLOWER[kind].format(block)] if kind in SLOWER else []


def _exact_tail(policy: Policy, block: int) -> str:
    prompts, completions = checked_rows(policy)
    ids, mask = padded(policy, completions, "right")
    none = torch.zeros(ids.shape, device=ids.device)
    rollout = Rollout(*padded(policy, prompts, "left"), ids, mask, none, none, none[:, 0].bool())
    with torch.no_grad(), captured(policy.blocks[block]) as states:
        right = plain_log_probs(policy, rollout)
    parts = boundary_of(states[0], whole_rows(rollout)[1], rollout)
    held = [part.clone().requires_grad_() for part in parts]
    rollout.boundary = BoundaryStates(block, *held)
    for kind in TAILS:
        policy.tails[block] = kind
        try:
            with torch.enable_grad():
                found, _ = completion_log_probs(policy, rollout, temperature=1.0)
                # A cache may have no gradient, and padding one that is not a number and reaches every weight.
                slopes = (
                    torch.autograd.grad(found.sum(), held) if kind != WHOLE and not policy.whole else [right]
                )
        except Exception as error:
            # An unknown architecture may raise anything.
            if is_out_of_memory(error):
                raise
            continue
        apart = float((found.detach() - right)[mask.bool()].abs().mean())
        if apart <= MOST_APART[policy.compute_dtype] and all(bool(part.isfinite().all()) for part in slopes):
            return kind
    del policy.tails[block]
    raise InputError(
        f"{type(policy.model).__name__} does not give the same log-probs twice for the same tokens, so "
        f"{policy.source.name} cannot be trained; use a {KNOWN}."
    )


def _prompt_of_row(rollout: Rollout) -> torch.Tensor:
    rows = torch.arange(len(rollout.completion_ids), device=rollout.completion_ids.device)
    return rows // rollout.group_size


def packs(
    lengths: Sequence[int], most_padding: float, most_rows: Callable[[int], int] | None = None
) -> list[list[int]]:
    """Rows that pass together, in as few packs as the padding limit allows, longest rows first; leaves out empty rows.

    Args:
        most_padding: share of a pack's tokens that may be padding; 1 makes one pack, of all rows in their order.
        most_rows: tokens of the longest row → how many rows may pass together; one always may.
    """
    rows = list(range(len(lengths))) if any(lengths) else []
    if most_padding < 1:
        rows = sorted((row for row in rows if lengths[row] > 0), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    tokens = 0
    for row in rows:
        tokens += lengths[row]
        pack = found[-1] if found else []
        padded = not pack or (len(pack) + 1) * lengths[pack[0]] * (1 - most_padding) > tokens
        if padded or (most_rows is not None and len(pack) + 1 > most_rows(lengths[pack[0]])):
            found.append([])
            tokens = lengths[row]
        found[-1].append(row)
    return found


def token_log_probs(
    policy: Policy,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
    chunk_values: int = CHUNK_VALUES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, fp32 [T] each, of `tokens` [T] that follow `hidden` [T, H], the head's input, in chunks.

    A token's log-prob depends only on its own hidden state. So with a frozen head the derivative is taken while the
    chunk's logits exist, and kept instead of them. A trained head makes its logits again for the gradient.
    """
    size = max(1, chunk_values // policy.model.config.get_text_config().vocab_size)
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    again = wanted and policy.whole

    def score(part: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = policy.logits(part)
        with full_precision(part.device):
            logits = logits.float()
            if temperature != 1:
                logits = logits / temperature
            log_probs = logits.log_softmax(-1)
            with torch.set_grad_enabled(wanted and entropy_gradient):
                entropies = -torch.linalg.vecdot(log_probs.exp(), log_probs)
            return log_probs.gather(-1, tokens[:, None])[:, 0], entropies

    log_probs, entropies = [], []
    for part, followed in zip(hidden.split(size), tokens.split(size), strict=True):
        if again:
            found = checkpoint(score, part, followed, use_reentrant=False)
        else:
            leaf = part.detach().requires_grad_(wanted)
            found = tuple(
                _with_slope(value, leaf, part) if value.requires_grad else value
                for value in score(leaf, followed)
            )
        log_probs.append(found[0])
        entropies.append(found[1])
    return torch.cat(log_probs), torch.cat(entropies)


def _with_slope(value: torch.Tensor, leaf: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`value` [T], computed row by row from `leaf` [T, H], as a function of `part`, which equals it."""
    (slope,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    return value.detach() + ((part - leaf.detach()) * slope).sum(-1).float()
