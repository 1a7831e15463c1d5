"""Single-turn completions: as many rows in flight together as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from midtune.device import random_state, set_random_state
from midtune.model.blocks import captured
from midtune.model.memory import slices
from midtune.model.policy import Policy
from midtune.rollout.apart import decoder_of
from midtune.rollout.boundary import BoundaryStates, storage_device, with_boundary
from midtune.rollout.decoding import ROOM, Decoder, Drawn, ready_to_sample
from midtune.rollout.engine import Engine, serves
from midtune.rollout.sampling import Rollout, Sampler, Sampling, SamplingLimits, padded
from midtune.rollout.speech import prompt_ids
from midtune.tasks import Row


@dataclass
class TextSampler:
    """The policy completes each prompt; see `Sampler`."""

    policy: Policy
    limits: SamplingLimits
    is_policy: bool = True
    # Prompts that wait take the room of rows that have ended.
    most_rows: int = 1024

    def begin(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows

    def prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        return [len(prompt_ids(self.policy.tokenizer, row["prompt"])) for row in rows]

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        ids = [prompt_ids(self.policy.tokenizer, prompt) for prompt in prompts[:: sampling.group_size]]
        return sample(self.policy, ids, sampling, boundary_block=boundary_block, limits=self.limits)


def sample(
    policy: Policy,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    boundary_block: int | None = None,
    limits: SamplingLimits | None = None,
) -> Rollout:
    """Sample a group of completions for every prompt.

    Every token has its own random number, drawn beforehand from torch's global random state. So the batch size does not
    change the tokens, and two policies that start from one state use the same numbers and differ less. Raises
    RunStopped if a single group does not fit into memory.
    """
    limits = limits or SamplingLimits()
    ids, mask = padded(policy, prompts, "left")
    group_size = sampling.group_size
    rows = len(prompts) * group_size
    uniforms = sampling.uniforms(sampling.max_new_tokens, rows, device=policy.device)
    storage = storage_device(policy, rows * sampling.max_new_tokens)
    most = [sampling.max_new_tokens] * rows

    def in_slots(groups: int) -> Rollout:
        engine = Engine(
            policy,
            ids,
            mask,
            group_size,
            groups=groups,
            watched=boundary_block,
            storage=storage,
            replayed=limits.replayed(policy),
        )
        drawn = engine.draw(sampling, most, uniforms, leave=True)
        return _rollout_of(ids, mask, drawn, boundary_block, engine.states)

    def plainly(part: slice, make: type[Decoder], boundary_block: int | None) -> Rollout:
        own = slice(part.start * group_size, part.stop * group_size)
        watched = None if boundary_block is None else policy.blocks[boundary_block]
        with captured(watched, storage=storage) as states:
            room = min(sampling.max_new_tokens, ROOM)
            decoder = make(policy, ids[part], mask[part], group_size, room)
            drawn = decoder.draw(
                sampling, most[own], None if uniforms is None else uniforms[:, own], leave=True
            )
        return _rollout_of(
            ids[part],
            mask[part],
            drawn,
            boundary_block,
            partial(_gathered, states, decoder.fed, drawn.lengths),
        )

    def run(groups: int) -> Rollout:
        with ready_to_sample(policy, groups * group_size, unpack=limits.unpack):
            if serves(policy, limits):
                return in_slots(groups)
            make = decoder_of(policy, limits.rows.on_message)
            # Other decoders feed rows in parts or again, so their states are made afterwards.
            watched = boundary_block if make is Decoder else None
            parts = [plainly(part, make, watched) for part in slices(len(prompts), groups)]
        rollout = Rollout.joined(parts, policy.tokenizer.pad_token_id)
        return (
            rollout
            if make is Decoder
            else with_boundary(TextSampler(policy, limits), rollout, boundary_block)
        )

    return limits.rows.fitting(len(prompts), group_size, run)


def _rollout_of(
    ids: torch.Tensor,
    mask: torch.Tensor,
    drawn: Drawn,
    block: int | None,
    states: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
) -> Rollout:
    """A rollout of what was drawn; with `block`, `states` gives those that entered it, for completions of a length."""
    longest = int(drawn.lengths.max())
    return Rollout(
        ids,
        mask,
        drawn.ids[:, :longest],
        (torch.arange(longest, device=mask.device) < drawn.lengths[:, None]).long(),
        drawn.log_probs[:, :longest],
        drawn.entropies[:, :longest],
        drawn.cut,
        None if block is None else BoundaryStates(block, *states(longest)),
    )


def _gathered(
    states: list[torch.Tensor], fed: list[torch.Tensor], lengths: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the states of each pass into the places of the rows that it fed."""
    prompt_states, *steps = states
    storage = prompt_states.device
    # Pinned memory returns to the device faster.
    completion_states = prompt_states.new_zeros(
        len(lengths), longest, prompt_states.size(-1), pin_memory=storage != lengths.device
    )
    for step, (rows, state) in enumerate(zip(fed, steps, strict=True)):
        completion_states[rows.to(storage), step] = state[:, 0]
    return prompt_states, completion_states


# Seed shared by runs → their first rollout, and the random state after it.
FirstRollouts = dict[int, tuple[Rollout, torch.Tensor]]


class AlikeSampler:
    """Shares a run's first rollout with runs of the same policy, prompts and seed; see `Sampler`.

    Untrained policies are alike if a thawed block computes what the frozen one did, so not with 4-bit blocks.

    `sampler` samples all other rollouts, and the first if it is not known yet; runs share `first`.
    """

    def __init__(self, sampler: Sampler, first: FirstRollouts, seed: int) -> None:
        self.policy, self.limits, self.is_policy = sampler.policy, sampler.limits, sampler.is_policy
        self.begin, self.prompt_lengths = sampler.begin, sampler.prompt_lengths
        self.most_rows = sampler.most_rows
        self._sampler, self._first, self._seed = sampler, first, seed
        self._begun = False

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        begun, self._begun = self._begun, True
        if not begun and self._seed in self._first:
            rollout, state = self._first[self._seed]
            set_random_state(self.policy.device, state)
            return with_boundary(self._sampler, rollout, boundary_block)
        rollout = self._sampler.sample(prompts, sampling, boundary_block=boundary_block)
        if not begun:
            self._first[self._seed] = replace(rollout, boundary=None), random_state(self.policy.device)
        return rollout
