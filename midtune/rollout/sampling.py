"""`Sampling` sets how to sample, `Rollout` is the result, and a `Sampler` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from midtune.model.memory import RowLimit
from midtune.model.policy import Policy
from midtune.rollout.boundary import BoundaryStates, stacked
from midtune.tasks import Row

if TYPE_CHECKING:
    from midtune.rollout.episodes import Episode

Which = TypeVar("Which", slice, torch.Tensor)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: where a completion is cut.
        temperature: 0 is greedy.
        top_p, top_k, min_p: keep the smallest set of tokens with this probability; the k likeliest (0: all);
            those with at least this share of the likeliest one's probability. Log-probs and entropies stay
            those of the full distribution, as the update computes them.
        stop_strings: texts that end a completion and belong to it.
        group_size: completions per prompt.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    group_size: int = 1

    def warpers(self) -> LogitsProcessorList:
        """Processors that set the log-probs of excluded tokens to -inf."""
        chosen = LogitsProcessorList()
        if self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            chosen.append(MinPLogitsWarper(self.min_p))
        return chosen


@dataclass
class SamplingLimits:
    """Memory limits of a sampler.

    Attributes:
        rows: how many completions are sampled together.
        unpack: unpack 4-bit weights during a rollout, if half the free memory holds them.
    """

    rows: RowLimit = field(
        default_factory=lambda: RowLimit(
            "sampling",
            "lower --max-new-tokens, --group-size or --samples, or add --set model.unpack=never",
        )
    )
    unpack: bool = True


@dataclass
class Rollout:
    """Completions of N prompts, G each; a prompt's completions are adjacent rows.

    Attributes:
        prompt_ids, prompt_mask: [N, P], left-padded.
        completion_ids, completion_mask: [N·G, C], right-padded; the end token is part of a completion.
        log_probs: [N·G, C] fp32, of each sampled token at the sampling temperature; 0 on padding.
        entropies: [N·G, C] fp32, of the distribution each token was drawn from; 0 on padding.
        cut: [N·G] bool, completions that reached the token limit.
        boundary: the states that enter the first trained block, if requested.
        drawn: [N·G, C], 1 for tokens the policy sampled and 0 for others; None: it sampled all.
        episodes: N·G episodes if completions were played in turns, else empty.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor
    cut: torch.Tensor
    boundary: BoundaryStates | None = None
    drawn: torch.Tensor | None = None
    episodes: Sequence[Episode] = ()

    @property
    def group_size(self) -> int:
        return self.completion_ids.size(0) // self.prompt_ids.size(0)

    @property
    def scored(self) -> torch.Tensor:
        """Mask of the tokens with log-probs, [N·G, C]: neither padding nor shown by an environment."""
        return self.completion_mask if self.drawn is None else self.completion_mask * self.drawn

    @property
    def environments(self) -> list[Any] | None:
        """The environment of each episode, for rewards; None without turns."""
        return [episode.environment for episode in self.episodes] or None

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt without padding."""
        lengths = self.prompt_mask.sum(1).tolist()
        return [
            ids[len(ids) - length :] for ids, length in zip(self.prompt_ids.tolist(), lengths, strict=True)
        ]

    def completions(self) -> list[list[int]]:
        """Token ids of each completion without padding."""
        return self.unpadded(self.completion_ids)

    def unpadded(self, values: torch.Tensor) -> list[list[Any]]:
        """Values of tokens [N·G, C] as lists without padding."""
        rows = zip(values.tolist(), self.completion_mask.sum(1).tolist(), strict=True)
        return [row[:length] for row, length in rows]

    def groups(self, prompts: Which) -> Rollout:
        """Select whole groups by their prompts: a slice (shares memory with this rollout) or numbers."""
        rows = self.rows_of(prompts)
        return Rollout(
            self.prompt_ids[prompts],
            self.prompt_mask[prompts],
            self.completion_ids[rows],
            self.completion_mask[rows],
            self.log_probs[rows],
            self.entropies[rows],
            self.cut[rows],
            self.boundary and self.boundary.part(prompts, rows),
            None if self.drawn is None else self.drawn[rows],
        )

    def rows_of(self, prompts: Which) -> Which:
        """The rows that hold the completions of some prompts."""
        if isinstance(prompts, slice):
            return slice(prompts.start * self.group_size, prompts.stop * self.group_size)
        within = torch.arange(self.group_size, device=prompts.device)
        return (prompts[:, None] * self.group_size + within).flatten()

    @staticmethod
    def joined(parts: Sequence[Rollout], pad_token_id: int) -> Rollout:
        """Concatenate the groups of `parts`; prompts are padded alike in all of them."""
        boundaries = [part.boundary for part in parts if part.boundary is not None]
        return Rollout(
            stacked([part.prompt_ids for part in parts]),
            stacked([part.prompt_mask for part in parts]),
            stacked([part.completion_ids for part in parts], pad_token_id),
            stacked([part.completion_mask for part in parts]),
            stacked([part.log_probs for part in parts]),
            stacked([part.entropies for part in parts]),
            torch.cat([part.cut for part in parts]),
            BoundaryStates.joined(boundaries) if boundaries else None,
        )


class Sampler(Protocol):
    """Draws completions: in one turn by the policy, in episodes with environments, or by a server.

    Attributes:
        is_policy: its rollouts' log-probs are the policy's own.
    """

    policy: Policy
    limits: SamplingLimits
    is_policy: bool

    def begin(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows with the prompts the policy sees; environments start their episodes."""

    def prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        """Prompt lengths in tokens of rows that may not have begun; if those are slow to make, of the first few."""

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        """Draw a completion for each prompt.

        Args:
            prompts: texts or chats of rows that have begun; a group's equal prompts are adjacent.
            boundary_block: also return the states that enter this block.

        Raises:
            RunStopped: a single group does not fit into memory.
        """


def padded(policy: Policy, rows: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, [N, T] each, padded on the `left` or `right`."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tokens, True, policy.tokenizer.pad_token_id, side)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], True, 0, side)
    return ids.to(policy.device), mask.to(policy.device)
