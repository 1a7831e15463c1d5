"""Log-probabilities of completions from boundary states, through only blocks k…L−1 and the head.

Each prompt passes once; its group shares its keys and values, with their gradient. Completions pass in packs of
similar length, to keep padding small. Logits are made once, one chunk of tokens at a time, so [B, T, V] never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from midtune.config import TrainingConfig
from midtune.model.blocks import TailCache
from midtune.model.policy import Policy, full_precision
from midtune.rollout.boundary import positions
from midtune.rollout.sampling import Rollout

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
    states = rollout.boundary
    assert states is not None
    recompute = recompute_tokens > 0 and torch.is_grad_enabled()
    tail = policy.tail(states.block, checkpointing=recompute)
    lengths = rollout.completion_mask.sum(1)
    # Prompts of other micro-batches may be longer.
    start = int(rollout.prompt_mask.argmax(1).min())
    prompt_mask = rollout.prompt_mask[:, start:]
    prompt_of_row = torch.arange(len(lengths), device=lengths.device) // rollout.group_size

    def entering(ids: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        # Trained embeddings need their gradient.
        return policy.model.get_input_embeddings()(ids) if policy.whole else held.to(policy.device)

    def prompts() -> tuple[torch.Tensor, ...]:
        cache = TailCache(states.block)
        hidden = tail(
            inputs_embeds=entering(rollout.prompt_ids[:, start:], states.prompt[:, start:]),
            attention_mask=prompt_mask,
            position_ids=positions(prompt_mask),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return hidden, *(part for layer in cache.layers for part in (layer.keys, layer.values))

    def completions(rows: torch.Tensor, fed: int, shared: Sequence[torch.Tensor]) -> torch.Tensor:
        own = prompt_of_row[rows]
        cache = TailCache(states.block, shared, own)
        mask = torch.cat([prompt_mask[own], rollout.completion_mask[rows, :fed]], 1)
        held = states.completion[rows.to(states.completion.device), :fed]
        hidden: torch.Tensor = tail(
            inputs_embeds=entering(rollout.completion_ids[rows, :fed], held),
            attention_mask=mask,
            position_ids=positions(mask)[:, -fed:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    with policy.autocast():
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
        place = torch.cat(places)
        found = token_log_probs(
            policy.model,
            torch.cat(hidden),
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
    model: nn.Module,
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
    head = model.get_output_embeddings()  # type: ignore[operator]
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr,operator]
    size = max(1, chunk_values // head.weight.size(0))
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    again = wanted and head.weight.requires_grad

    def score(part: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(part)
        with full_precision(part.device):
            logits = logits.float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
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
