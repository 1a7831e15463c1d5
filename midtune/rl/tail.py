"""Log-probabilities of completions from boundary states, through blocks k…L−1 and the head alone.

Each prompt passes once; its keys and values, with their gradient, are shared by its group. Logits are
made for a chunk of tokens at a time and made again in the backward pass, so [B, T, V] never exists.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from midtune.model.blocks import TailCache
from midtune.model.policy import Policy
from midtune.rollout.boundary import positions
from midtune.rollout.sampler import Rollout

# Logits of one chunk in fp32 take this many values: 256 MiB.
CHUNK_VALUES = 2**26


def completion_log_probs(
    policy: Policy, rollout: Rollout, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of every completion token and entropy of the distribution it was drawn from.

    Args:
        policy: the policy as it is now.
        rollout: whole groups, with boundary states.
        temperature: what logits are divided by.

    Returns:
        Two fp32 tensors [N·G, C], 0 on padding; the gradient reaches the trained blocks through both.
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
            policy.model, hidden[keep], rollout.completion_ids[:, :longest][keep], temperature
        )
    full = keep.new_zeros(keep.size(0), width)
    full[:, :longest] = keep
    return tuple(  # type: ignore[return-value]
        torch.zeros(full.shape, device=full.device).masked_scatter(full, values) for values in scored
    )


def token_log_probs(
    model: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, in chunks.

    Args:
        hidden: [T, H], what enters the head.
        tokens: [T], the token that followed each position.

    Returns:
        Log-probs [T] and entropies [T], fp32.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr,operator]
    size = max(1, CHUNK_VALUES // head.weight.size(0))

    def score(part: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(part).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = (logits / temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, wanted[:, None])[:, 0], entropy

    parts = [
        checkpoint(score, part, wanted, use_reentrant=False)
        for part, wanted in zip(hidden.split(size), tokens.split(size), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)
