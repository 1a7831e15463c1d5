"""What sampling is asked for, `Sampling`; what it returns, `Rollout`; and what does it, `Sampler`."""

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
        top_p, top_k, min_p: keep the smallest set of tokens with this probability; the k most likely ones (0: all);
            those with at least this share of the likeliest one's probability. Log-probs and entropies stay
            those of the full distribution, as the update computes them.
        stop_strings: texts that end a completion, each part of the completion it ends.
        group_size: completions of each prompt.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    group_size: int = 1

    def warpers(self) -> LogitsProcessorList:
        """Sets the log-probs of tokens that are not to be drawn to -inf."""
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
    """What memory allows a sampler.

    Attributes:
        rows: how many completions are sampled together.
        unpack: 4-bit weights may be unpacked for the length of a rollout, where half the free memory holds them.
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
    """Completions of N prompts, G each; the completions of a prompt are adjacent rows.

    Attributes:
        prompt_ids, prompt_mask: [N, P], left-padded.
        completion_ids, completion_mask: [N·G, C], right-padded; the end token is part of a completion.
        log_probs: [N·G, C] fp32, of each sampled token at the sampling temperature; 0 on padding.
        entropies: [N·G, C] fp32, of the distribution each token was drawn from; 0 on padding.
        cut: [N·G] bool, completions that the limit of tokens ended.
        boundary: the states that enter the first trained block, where they were asked for.
        drawn: [N·G, C], 1 for tokens that the policy sampled and 0 for others; None: it sampled all.
        episodes: the N·G episodes, where completions were played in turns.
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
        """The tokens that have log-probs, [N·G, C]: neither padding nor put by an environment."""
        return self.completion_mask if self.drawn is None else self.completion_mask * self.drawn

    @property
    def environments(self) -> list[Any] | None:
        """The environment of each episode, for rewards; None where nothing was played in turns."""
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
        """Values of tokens [N·G, C] as lists without those of padding."""
        rows = zip(values.tolist(), self.completion_mask.sum(1).tolist(), strict=True)
        return [row[:length] for row, length in rows]

    def groups(self, prompts: Which) -> Rollout:
        """The whole groups of some prompts, given as a slice (sharing memory with this one) or by their numbers."""
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
        """The groups of `parts` one after the other; prompts are padded alike in all of them."""
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
    """Draws completions: of one turn by the policy, in episodes with environments, or by a server.

    Attributes:
        policy: what is sampled from.
        limits: what memory allows.
        is_policy: the log-probs of its rollouts are those of the policy itself.
    """

    policy: Policy
    limits: SamplingLimits
    is_policy: bool

    def begin(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows with what the policy is shown as their prompts; environments begin their episodes."""

    def prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of the prompts of rows, which need not have begun; where these take long, of the first few."""

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        """A completion for each prompt.

        Args:
            prompts: of the rows as they have begun, texts or chats; the equal ones of a group are adjacent.
            boundary_block: also give the states that enter this block.

        Raises:
            RunStopped: a single group does not fit into memory.
        """


def padded(policy: Policy, rows: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, [N, T] each, padded on the `left` or on the `right`."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tokens, True, policy.tokenizer.pad_token_id, side)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], True, 0, side)
    return ids.to(policy.device), mask.to(policy.device)
