"""The hidden states that enter block k, per prompt and per completion.

Everything below the first trained block is frozen, so these states never change for a given sequence:
they are captured while sampling and the blocks below k are not run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from midtune.model.policy import Policy


@dataclass
class BoundaryStates:
    """Hidden states that enter block `block`.

    Attributes:
        prompt: [N, P, H], one row a prompt, left-padded as the prompts are.
        completion: [N·G, C, H]; the state of a completion's last token is never needed and is zero when
            the states were captured while sampling.
    """

    block: int
    prompt: torch.Tensor
    completion: torch.Tensor


class _Reached(Exception):
    """Ends a forward pass at the boundary."""


@contextlib.contextmanager
def captured(policy: Policy, block: int | None, *, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collects the states [B, T, H] that enter `block` in each forward pass inside the context.

    Args:
        policy: the policy whose model is run inside the context.
        block: the block to watch; None collects nothing.
        stop: end each forward pass there; the pass then returns nothing and must be wrapped by `below`.
    """
    states: list[torch.Tensor] = []

    def keep(
        module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
    ) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        if stop:
            raise _Reached

    if block is None:
        yield states
        return
    hook = policy.blocks[block].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield states
    finally:
        hook.remove()


@torch.no_grad()
def recompute(
    policy: Policy,
    block: int,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> BoundaryStates:
    """The boundary states of sequences that were sampled elsewhere, by one pass through the blocks below.

    Args:
        prompt_ids, prompt_mask: [N, P], left-padded.
        completion_ids, completion_mask: [N·G, C], right-padded, the G completions of a prompt adjacent.
    """
    group_size = completion_ids.size(0) // prompt_ids.size(0)
    width = prompt_ids.size(1)
    ids = torch.cat([prompt_ids.repeat_interleave(group_size, 0), completion_ids], 1)
    mask = torch.cat([prompt_mask.repeat_interleave(group_size, 0), completion_mask], 1)
    with captured(policy, block, stop=True) as states, policy.autocast(), contextlib.suppress(_Reached):
        policy.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return BoundaryStates(block, states[0][::group_size, :width], states[0][:, width:])


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of every token among the tokens that are not padding, [B, T] → [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
