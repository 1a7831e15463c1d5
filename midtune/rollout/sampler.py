"""Sampling: each prompt is prefilled once, its cache is shared by the group, finished rows leave the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from midtune.device import free_bytes
from midtune.model.memory import slices
from midtune.model.policy import Policy, full_precision
from midtune.model.quantize import unpacked
from midtune.rollout.boundary import BoundaryStates, captured, home_of, positions, recompute, stacked
from midtune.rollout.keys_values import closed_up, shared_prompts

# Tokens that keys and values have room for beyond those they hold.
ROOM = 128


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: where a completion is cut.
        temperature: 0 is greedy.
        top_p, top_k, min_p: keep the smallest set of tokens with this probability; the k most likely ones (0: all);
            those with at least this share of the likeliest one's probability. Log-probs and entropies stay
            those of the full distribution, as the update computes them.
        stop_strings: texts that end a completion, each part of the completion it ends.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()

    def warpers(self) -> LogitsProcessorList:
        """What sets the log-probs of tokens that are not to be drawn to -inf."""
        chosen = LogitsProcessorList()
        if self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            chosen.append(MinPLogitsWarper(self.min_p))
        return chosen


@dataclass
class Rollout:
    """Completions of N prompts, G each; the completions of a prompt are adjacent rows.

    Attributes:
        prompt_ids, prompt_mask: [N, P], left-padded.
        completion_ids, completion_mask: [N·G, C], right-padded; the end token is part of a completion.
        log_probs: [N·G, C] fp32, of each sampled token at the sampling temperature; 0 on padding.
        entropies: [N·G, C] fp32, of the distribution each token was drawn from; 0 on padding.
        boundary: the states that enter the first trained block, where they were asked for.
        drawn: [N·G, C], 1 where the policy sampled a token and 0 where something else put it; None: it sampled all.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor
    boundary: BoundaryStates | None = None
    drawn: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.completion_ids.size(0) // self.prompt_ids.size(0)

    @property
    def scored(self) -> torch.Tensor:
        """The tokens that have log-probs, [N·G, C]: neither padding nor put by something else."""
        return self.completion_mask if self.drawn is None else self.completion_mask * self.drawn

    def completions(self) -> list[list[int]]:
        """Token ids of each completion without padding."""
        rows = zip(self.completion_ids.tolist(), self.completion_mask.sum(1).tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def groups(self, start: int, stop: int) -> Rollout:
        """The part of prompts start…stop−1, with whole groups, sharing memory with this one."""
        rows = slice(start * self.group_size, stop * self.group_size)
        return self._part(slice(start, stop), rows)

    def groups_at(self, prompts: torch.Tensor) -> Rollout:
        """The part of the prompts with these numbers, with whole groups, copied."""
        return self._part(prompts, self.rows_of(prompts))

    def rows_of(self, prompts: torch.Tensor) -> torch.Tensor:
        """The rows that hold the completions of the prompts with these numbers."""
        within = torch.arange(self.group_size, device=prompts.device)
        return (prompts[:, None] * self.group_size + within).flatten()

    @staticmethod
    def joined(parts: Sequence[Rollout], pad_token_id: int) -> Rollout:
        """The groups of `parts` one after the other; prompts are padded alike in all of them."""
        boundaries = [part.boundary for part in parts if part.boundary is not None]
        drawn = [part.drawn for part in parts if part.drawn is not None]
        return Rollout(
            stacked([part.prompt_ids for part in parts]),
            stacked([part.prompt_mask for part in parts]),
            stacked([part.completion_ids for part in parts], pad_token_id),
            stacked([part.completion_mask for part in parts]),
            stacked([part.log_probs for part in parts]),
            stacked([part.entropies for part in parts]),
            BoundaryStates.joined(boundaries) if boundaries else None,
            stacked(drawn) if drawn else None,
        )

    def _part(self, prompts: slice | torch.Tensor, rows: slice | torch.Tensor) -> Rollout:
        boundary = self.boundary and self.boundary.part(prompts, rows)
        return Rollout(
            self.prompt_ids[prompts],
            self.prompt_mask[prompts],
            self.completion_ids[rows],
            self.completion_mask[rows],
            self.log_probs[rows],
            self.entropies[rows],
            boundary,
            None if self.drawn is None else self.drawn[rows],
        )


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    group_size: int = 1,
    boundary_block: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample `group_size` completions for every prompt, all rows in flight together, or what memory holds.

    Every token has a random number of its own, drawn beforehand from torch's global random state. So two
    policies that start from one state meet the same luck, whatever they answer, and differ the less; and
    tokens are the same, however many rows go together.

    Args:
        policy: the model to sample from.
        prompts: token ids of each prompt.
        boundary_block: capture the states that enter this block.
        on_tokens: called with the number of new tokens after every step.

    Raises:
        RunStopped: a single group does not fit into memory.
    """
    prompt_ids, prompt_mask = padded(policy, prompts, "left")
    rows = len(prompts) * group_size
    drawn = sampling.temperature > 0
    luck = torch.rand(sampling.max_new_tokens, rows, device=policy.device) if drawn else None
    home = home_of(policy, rows * sampling.max_new_tokens)

    def run(groups: int) -> Rollout:
        with ready_to_sample(policy, groups * group_size):
            parts = [
                _sample_together(
                    policy,
                    prompt_ids[part],
                    prompt_mask[part],
                    sampling,
                    None if luck is None else luck[:, part.start * group_size : part.stop * group_size],
                    group_size,
                    boundary_block,
                    home,
                    on_tokens,
                )
                for part in slices(len(prompts), groups)
            ]
        return Rollout.joined(parts, policy.tokenizer.pad_token_id)

    return policy.sampling_rows.fitting(len(prompts), group_size, run)


def _sample_together(
    policy: Policy,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    sampling: Sampling,
    luck: torch.Tensor | None,
    group_size: int,
    boundary_block: int | None,
    home: torch.device,
    on_tokens: Callable[[int], None] | None,
) -> Rollout:
    """Sample whole groups, all rows in flight together.

    Args:
        prompt_ids, prompt_mask: [N, P], left-padded.
        luck: [T, N·G], the random number of each token; greedily there is none.
        home: where boundary states are kept.
    """
    device, pad = policy.device, policy.tokenizer.pad_token_id
    rows = len(prompt_ids) * group_size
    completion_ids = torch.full((rows, sampling.max_new_tokens), pad, device=device)
    log_probs = torch.zeros(rows, sampling.max_new_tokens, device=device)
    entropies = torch.zeros_like(log_probs)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    ends = ends_of(policy, sampling)
    warpers = sampling.warpers()
    cache = shared_prompts(room=min(sampling.max_new_tokens, ROOM))
    fed: list[torch.Tensor] = []
    with captured(policy, boundary_block, home=home) as states:
        output = policy.model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=positions(prompt_mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(group_size)
        logits = output.logits[:, -1].repeat_interleave(group_size, 0)
        mask = prompt_mask.repeat_interleave(group_size, 0)
        position = mask.sum(1, keepdim=True)
        live = torch.arange(rows, device=device)
        for step in range(sampling.max_new_tokens):
            tokens, log_probs[live, step], entropies[live, step] = choose(
                logits, sampling.temperature, warpers, None if luck is None else luck[step, live]
            )
            completion_ids[live, step] = tokens
            lengths[live] = step + 1
            if on_tokens is not None:
                on_tokens(len(live))
            going = ~ends(completion_ids[live, : step + 1])
            if step + 1 == sampling.max_new_tokens or not going.any():
                break
            if not going.all():
                kept = closed_up(going)
                cache.batch_select_indices(kept)
                live, tokens, mask, position = live[kept], tokens[kept], mask[kept], position[kept]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
            output = policy.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
            position = position + 1
            fed.append(live)

    longest = int(lengths.max())
    completion_mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    boundary = None
    if boundary_block is not None:
        prompt_states, *steps = states
        # Pinned, it goes back to the device faster.
        completion_states = prompt_states.new_zeros(
            rows, longest, prompt_states.size(-1), pin_memory=home != device
        )
        for step, (live, state) in enumerate(zip(fed, steps, strict=True)):
            completion_states[live.to(home), step] = state[:, 0]
        boundary = BoundaryStates(boundary_block, prompt_states, completion_states)
    return Rollout(
        prompt_ids,
        prompt_mask,
        completion_ids[:, :longest],
        completion_mask,
        log_probs[:, :longest],
        entropies[:, :longest],
        boundary,
    )


@torch.no_grad()
def sampled_elsewhere(
    policy: Policy,
    prompts: list[list[int]],
    completions: list[list[int]],
    log_probs: list[list[float]],
    boundary_block: int,
) -> Rollout:
    """The rollout of completions that came from another sampler, the G of a prompt adjacent.

    Args:
        log_probs: of each token, as that sampler has them. Entropies are not known, and zero.
    """
    prompt_ids, prompt_mask = padded(policy, prompts, "left")
    ids, mask = padded(policy, completions, "right")
    known = torch.zeros(ids.shape, device=ids.device)
    known[mask.bool()] = torch.tensor([value for row in log_probs for value in row], device=ids.device)
    boundary = recompute(policy, boundary_block, prompt_ids, prompt_mask, ids, mask)
    return Rollout(prompt_ids, prompt_mask, ids, mask, known, torch.zeros_like(known), boundary)


def padded(policy: Policy, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, [N, T] each, padded on the `left` or on the `right`."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), policy.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        place = slice(width - len(own), width) if side == "left" else slice(len(own))
        ids[row, place] = torch.tensor(own)
        mask[row, place] = 1
    return ids.to(policy.device), mask.to(policy.device)


def choose(
    logits: torch.Tensor,
    temperature: float,
    warpers: LogitsProcessorList,
    luck: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a token from each row of logits [B, V] → token ids, their log-probs and the entropies, all [B].

    Log-probs and entropies are fp32, of the full distribution at the temperature (1 where it is 0, greedy).

    Args:
        luck: [B] uniform in [0, 1), a number for each row's draw; greedily there is none.
    """
    with full_precision(logits.device):
        logits = logits.float()
        log_probs = (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)
        probs = log_probs.exp()
        if luck is None:
            tokens = log_probs.argmax(-1)
        elif warpers:
            # They look at scores alone.
            tokens = _drawn(warpers(None, log_probs).softmax(-1), luck)
        else:
            tokens = _drawn(probs, luck)
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0]
        # 0 · log 0 is 0.
        return (
            tokens,
            chosen,
            -torch.linalg.vecdot(probs, log_probs.clamp_(min=torch.finfo(torch.float32).min)),
        )


def _drawn(probs: torch.Tensor, luck: torch.Tensor) -> torch.Tensor:
    """The token of each row of probabilities [B, V] on whose stretch of their sums its luck [B] falls → [B].

    Multinomial draws a random number for every token of the vocabulary, which on a CPU takes longer than the
    whole head.
    """
    # A CPU adds fp32 numbers up in double precision and in order; a GPU needs to be told.
    sums = probs.cumsum(-1) if probs.device.type == "cpu" else probs.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    aim = torch.minimum(luck[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, aim, right=True)[:, 0]


def ends_of(policy: Policy, sampling: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function: completions so far [B, T] → which of them end with their last token, [B] bool."""
    stop_ids = torch.tensor(policy.stop_token_ids, device=policy.device)
    if not sampling.stop_strings:
        return lambda completions: torch.isin(completions[:, -1], stop_ids)
    texts = StopStringCriteria(policy.tokenizer, list(sampling.stop_strings))
    return lambda completions: torch.isin(completions[:, -1], stop_ids) | texts(completions, None)


@contextlib.contextmanager
def ready_to_sample(policy: Policy, rows: int) -> Iterator[None]:
    """Without dropout, and with weights unpacked where that pays for so many rows and half the free memory has room."""
    room = free_bytes(policy.device) // 2 if policy.unpack else 0
    with (
        _evaluating(policy.model),
        unpacked(policy.model, policy.compute_dtype, rows=rows, most_bytes=room),
        policy.autocast(),
    ):
        yield


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
