"""What a model computes, written the slow and obvious way: row by row, without padding or a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from midtune.model.policy import Policy
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits
from midtune.rollout.text import sample

# The first is longer than every architecture's window.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33], [40]]


def sampled(
    policy: Policy,
    *,
    seed: int = 0,
    boundary_block: int | None = None,
    limits: SamplingLimits | None = None,
    **settings: Any,
) -> Rollout:
    """Three completions of each prompt."""
    torch.manual_seed(seed)
    sampling = Sampling(**{"max_new_tokens": 12, "group_size": 3, **settings})
    return sample(policy, PROMPTS, sampling, boundary_block=boundary_block, limits=limits)


def stop_early(policy: Policy) -> list[int]:
    """Let a quarter of the vocabulary end a completion, so that lengths differ; returns those tokens."""
    policy.model.generation_config.eos_token_id = list(range(100, 165))
    return policy.stop_token_ids


def plain_log_probs(
    policy: Policy, rollout: Rollout, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N·G, C] of a rollout's completions under the model; 0 on padding."""
    found = []
    for row, completion in enumerate(rollout.completions()):
        prompt = row // rollout.group_size
        ids = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt].bool()].tolist()
        sequence = torch.tensor([ids + completion])
        logits = policy.model(input_ids=sequence, use_cache=False).logits[0, len(ids) - 1 : -1]
        distribution = torch.distributions.Categorical(logits=logits / temperature)
        found.append((distribution.log_prob(sequence[0, len(ids) :]), distribution.entropy()))
    log_probs, entropies = zip(*found, strict=True)
    return pad_sequence(log_probs, batch_first=True), pad_sequence(entropies, batch_first=True)
