"""The hidden states that enter block k, per prompt and per completion.

Everything below the first trained block is frozen, so these states never change: sampling captures them once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from midtune.device import free_bytes
from midtune.model.blocks import Reached, captured
from midtune.model.memory import slices
from midtune.model.policy import Policy

if TYPE_CHECKING:
    from midtune.rollout.sampling import Rollout, Sampler

# Largest mean |Δ log-prob| that rounding explains, between two ways of computing the same.
MOST_APART = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class BoundaryStates:
    """Hidden states that enter block `block`; they may lie on the host, see `storage_device`."""

    block: int
    prompt: torch.Tensor  # [N, P, H], one row a prompt, left-padded as the prompts are
    completion: torch.Tensor  # [N·G, C, H]; the last token's state is unused, zero if captured while sampling

    def part(self, prompts: slice | torch.Tensor, rows: slice | torch.Tensor) -> BoundaryStates:
        """Select the states of some prompts and completions, on the device that keeps them."""

        def chosen(states: torch.Tensor, which: slice | torch.Tensor) -> torch.Tensor:
            return states[which if isinstance(which, slice) else which.to(states.device)]

        return BoundaryStates(self.block, chosen(self.prompt, prompts), chosen(self.completion, rows))

    @staticmethod
    def joined(parts: Sequence[BoundaryStates]) -> BoundaryStates:
        """Concatenate the states of `parts`; prompts are padded alike in all of them."""
        prompt, completion = [part.prompt for part in parts], [part.completion for part in parts]
        return BoundaryStates(parts[0].block, stacked(prompt), stacked(completion))


def storage_device(policy: Policy, tokens: int) -> torch.device:
    """Where to keep the boundary states of `tokens` tokens: the policy's device, or the host if they crowd it."""
    state_bytes = policy.model.config.get_text_config().hidden_size * policy.compute_dtype.itemsize
    crowded = tokens * state_bytes > free_bytes(policy.device) // 4
    return torch.device("cpu") if crowded else policy.device


@torch.no_grad()
def with_boundary(sampler: Sampler, rollout: Rollout, block: int | None) -> Rollout:
    """Add the states that enter `block`, by one pass through the blocks below; None: change nothing.

    Each prompt passes once; its group shares its keys and values. As many groups pass together as memory holds.
    """
    if block is None:
        return rollout
    storage = storage_device(sampler.policy, rollout.completion_ids.numel())

    def run(groups: int) -> BoundaryStates:
        found = []
        for part in slices(len(rollout.prompt_ids), groups):
            states = _below(sampler.policy, block, rollout.groups(part))
            found.append(BoundaryStates(block, *(state.to(storage) for state in states)))
        return BoundaryStates.joined(found)

    boundary = sampler.limits.rows.fitting(len(rollout.prompt_ids), rollout.group_size, run)
    return replace(rollout, boundary=boundary)


def _below(policy: Policy, block: int, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of prompts and of their completions, which pass through the blocks below `block`."""
    from midtune.rollout.apart import decoder_of
    from midtune.rollout.decoding import Decoder

    def below(ids: torch.Tensor, **passed: Any) -> None:
        with contextlib.suppress(Reached):
            policy.model(input_ids=ids, **passed)

    shared = decoder_of(policy) is Decoder
    with captured(policy.blocks[block], stop=True) as states, policy.autocast():
        if not shared:
            ids, order, _ = whole_rows(rollout)
            below(ids, use_cache=False)
            return boundary_of(states[0], order, rollout)
        cache = DynamicCache()

        def onto(ids: torch.Tensor, mask: torch.Tensor) -> None:
            width = ids.size(1)
            below(
                ids,
                # Below block 0 there is nothing to attend to, and no cache.
                attention_mask=mask if block > 0 else mask[:, -width:],
                position_ids=positions(mask)[:, -width:],
                use_cache=True,
                **{policy.cache_argument: cache},
            )

        onto(rollout.prompt_ids, rollout.prompt_mask)
        cache.batch_repeat_interleave(rollout.group_size)
        prompt_mask = rollout.prompt_mask.repeat_interleave(rollout.group_size, 0)
        onto(rollout.completion_ids, torch.cat([prompt_mask, rollout.completion_mask], 1))
    prompt, completion = states
    return prompt, completion


def whole_rows(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each completion after its prompt: token ids [N·G, P + C], padded on the right only, and lengths [N·G].

    Between them the order, [N·G, P + C]: where each token lies when prompts are padded on the left.
    """
    ids, mask = (
        torch.cat([prompts.repeat_interleave(rollout.group_size, 0), completions], 1)
        for prompts, completions in (
            (rollout.prompt_ids, rollout.completion_ids),
            (rollout.prompt_mask, rollout.completion_mask),
        )
    )
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), order, mask.sum(1)


def boundary_of(
    states: torch.Tensor, order: torch.Tensor, rollout: Rollout
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [N·G, P + C, H] of whole rows in this `order` as those of the N prompts and of the completions."""
    back = states.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, states.size(-1)))
    width = rollout.prompt_ids.size(1)
    return back[:: rollout.group_size, :width], back[:, width:]


def plain_log_probs(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """Log-probs [N·G, C] of the completions by one plain forward pass without a cache; undefined on padding.

    Ways of computing them that are faster are compared with these; see `MOST_APART`.
    """
    ids, order, _ = whole_rows(rollout)
    with policy.autocast():
        logits = policy.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return boundary_of(torch.cat([torch.zeros_like(found[:, :1]), found], 1), order, rollout)[1][..., 0]


def stacked(parts: Sequence[torch.Tensor], padding: float = 0) -> torch.Tensor:
    """Concatenate tensors [N, T, …] along N, right-padded to the widest; a single one is returned as is."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.size(1) for part in parts)
    shape = (sum(map(len, parts)), width, *parts[0].shape[2:])
    whole = parts[0].new_full(shape, padding, pin_memory=parts[0].is_pinned())
    start = 0
    for part in parts:
        whole[start : start + len(part), : part.size(1)] = part
        start += len(part)
    return whole


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of every token among the tokens that are not padding, [B, T] → [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
