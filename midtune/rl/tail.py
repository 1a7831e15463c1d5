"""Log-probabilities of completions from boundary states, through blocks k…L−1 and the head alone.

Each prompt passes once; its keys and values, with their gradient, are shared by its group. Logits are
made for a chunk of tokens at a time, so [B, T, V] never exists, and never made again.
"""

from __future__ import annotations

import torch
from torch import nn

from midtune.model.blocks import TailCache
from midtune.model.policy import Policy
from midtune.rollout.boundary import positions
from midtune.rollout.sampler import Rollout

# Logits of one chunk in fp32 take this many values: 64 MiB. More is slower on a CPU, which has to be given new
# pages for every tensor, and no faster elsewhere.
CHUNK_VALUES = 2**24


def completion_log_probs(
    policy: Policy, rollout: Rollout, *, temperature: float, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of every completion token and entropy of the distribution it was drawn from.

    Args:
        policy: the policy as it is now.
        rollout: whole groups, with boundary states.
        temperature: what logits are divided by.
        entropy_gradient: let the gradient reach the trained blocks through the entropies too.

    Returns:
        Two fp32 tensors [N·G, C], 0 on padding; the gradient reaches the trained blocks through the first.
    """
    assert rollout.boundary is not None
    width = rollout.completion_ids.size(1)
    longest = max(int(rollout.completion_mask.sum(1).max()), 1)
    states = rollout.boundary
    tail = policy.tail(states.block)
    cache = TailCache(states.block)
    group_size = rollout.group_size
    completion_mask = rollout.completion_mask[:, :longest]
    with policy.autocast():
        hidden = tail(
            inputs_embeds=states.prompt,
            attention_mask=rollout.prompt_mask,
            position_ids=positions(rollout.prompt_mask),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1:]
        hidden = hidden.repeat_interleave(group_size, 0)
        if longest > 1:
            cache.batch_repeat_interleave(group_size)
            prompt_mask = rollout.prompt_mask.repeat_interleave(group_size, 0)
            mask = torch.cat([prompt_mask, completion_mask[:, :-1]], 1)
            rest = tail(
                inputs_embeds=states.completion[:, : longest - 1],
                attention_mask=mask,
                position_ids=positions(mask)[:, prompt_mask.size(1) :],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            hidden = torch.cat([hidden, rest], 1)
        keep = completion_mask.bool()
        scored = token_log_probs(
            policy.model,
            hidden[keep],
            rollout.completion_ids[:, :longest][keep],
            temperature,
            entropy_gradient=entropy_gradient,
        )
    full = keep.new_zeros(keep.size(0), width)
    full[:, :longest] = keep
    return tuple(  # type: ignore[return-value]
        torch.zeros(full.shape, device=full.device).masked_scatter(full, values) for values in scored
    )


def token_log_probs(
    model: nn.Module,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, in chunks.

    The head is frozen and a token's log-prob depends on its own hidden state alone, so its derivative is
    taken at once, while the chunk's logits are there, and kept in their place.

    Args:
        hidden: [T, H], what enters the head.
        tokens: [T], the token that followed each position.
        entropy_gradient: let the gradient reach `hidden` through the entropies too.

    Returns:
        Log-probs [T] and entropies [T], fp32.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr,operator]
    size = max(1, CHUNK_VALUES // head.weight.size(0))
    wanted = torch.is_grad_enabled() and hidden.requires_grad

    def score(part: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(part).float()
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
        leaf = part.detach().requires_grad_(wanted)
        found = score(leaf, followed)
        with_slope = [_with_slope(value, leaf, part) if value.requires_grad else value for value in found]
        log_probs.append(with_slope[0])
        entropies.append(with_slope[1])
    return torch.cat(log_probs), torch.cat(entropies)


def _with_slope(value: torch.Tensor, leaf: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`value` [T], computed from `leaf` [T, H] row by row, as a function of `part`, which equals it."""
    (slope,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    return value.detach() + ((part - leaf.detach()) * slope).sum(-1).float()
