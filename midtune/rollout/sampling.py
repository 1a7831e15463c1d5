"""`Sampling` sets how to sample, `Rollout` is the result, and a `Sampler` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from midtune.model.host import is_here
from midtune.model.memory import RowLimit
from midtune.model.policy import Policy
from midtune.rollout.boundary import BoundaryStates, stacked
from midtune.rollout.graphs import Replayed
from midtune.tasks import Row

if TYPE_CHECKING:
    from midtune.rollout.episodes import Episode

Which = TypeVar("Which", slice, torch.Tensor)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Log-probs and entropies stay those of the full distribution, whatever tokens are kept, as the update computes them.
    """

    max_new_tokens: int  # a completion is cut there
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the smallest set of tokens with this probability
    top_k: int = 0  # keep the k likeliest; 0: all
    min_p: float = 0.0  # keep those with at least this share of the likeliest one's probability
    stop_strings: tuple[str, ...] = ()  # texts that end a completion and belong to it
    group_size: int = 1  # completions per prompt
    others: tuple[int, int] = (0, 0)  # rows of the batch that other processes draw, before and after these

    def uniforms(self, *shape: int, device: torch.device) -> torch.Tensor | None:
        """A number of U(0, 1) for each token, whose last dimension counts rows; None when greedy.

        They come from torch's global random state, and are those that one process would draw for the whole batch.
        """
        if self.temperature == 0:
            return None
        before, after = self.others
        *tokens, rows = shape
        return torch.rand(*tokens, before + rows + after, device=device)[..., before : before + rows]

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
    """Memory limits of a sampler; `rows` limits the completions sampled together."""

    rows: RowLimit = field(
        default_factory=lambda: RowLimit(
            "sampling", "lower --max-new-tokens, --group-size or --samples, or add --set model.unpack=never"
        )
    )
    unpack: bool = True  # unpack 4-bit weights during a rollout, if half the free memory holds them
    graphs: bool = True  # on a card, record decode steps and replay them
    plain: bool = False  # sample by the plain decoder, the reference

    _replayed: Replayed | None = None

    def replayed(self, policy: Policy) -> Replayed | None:
        """What records this policy's decode steps; None if nothing does.

        Embeddings on the host are asked for every token, which cannot be recorded.
        """
        if not (self.graphs and is_here(policy.model) and policy.device.type == "cuda"):
            return None
        if self._replayed is None:
            self._replayed = Replayed(self.rows.on_message)
        return self._replayed


@dataclass
class Rollout:
    """Completions of N prompts, G each; a prompt's completions are adjacent rows."""

    prompt_ids: torch.Tensor  # [N, P], left-padded
    prompt_mask: torch.Tensor  # [N, P]
    completion_ids: torch.Tensor  # [N·G, C], right-padded; the end token is part of a completion
    completion_mask: torch.Tensor  # [N·G, C]
    log_probs: torch.Tensor  # [N·G, C] fp32, at the sampling temperature; 0 on padding
    entropies: torch.Tensor  # [N·G, C] fp32, of each token's distribution; 0 on padding
    cut: torch.Tensor  # [N·G] bool, completions that reached the token limit
    boundary: BoundaryStates | None = None  # if requested
    drawn: torch.Tensor | None = None  # [N·G, C], 1 if the policy sampled the token, else 0; None: all 1
    episodes: Sequence[Episode] = ()  # N·G if played in turns, else empty

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

    def groups(self, prompts: Which, most: int | None = None) -> Rollout:
        """Select groups by their prompts: a slice (shares memory with this rollout) or numbers.

        With `most`, only that many completions of each are kept; see `rows_of`.
        """
        rows = self.rows_of(prompts, most)
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

    def rows_of(self, prompts: Which, most: int | None = None) -> Which:
        """The rows that hold the completions of some prompts, or the first `most` of each prompt given by number."""
        if isinstance(prompts, slice):
            return slice(prompts.start * self.group_size, prompts.stop * self.group_size)
        within = torch.arange(min(most or self.group_size, self.group_size), device=prompts.device)
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
    """Draws completions: in one turn by the policy, in episodes with environments, or by a server."""

    policy: Policy
    limits: SamplingLimits
    is_policy: bool  # its rollouts' log-probs are the policy's own
    most_rows: int  # completions that scoring asks for in one call

    def begin(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows with the prompts the policy sees; environments start their episodes."""

    def prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        """Prompt lengths in tokens of rows that may not have begun; if those are slow to make, of the first few."""

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        """Draw a completion for each prompt, and with `boundary_block` the states that enter that block.

        Prompts are texts, chats or tokens of rows that have begun; a group's equal prompts are adjacent. Raises
        RunStopped if a single group does not fit into memory.
        """


def padded(policy: Policy, rows: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, [N, T] each, padded on the `left` or `right`."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tokens, True, policy.tokenizer.pad_token_id, side)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], True, 0, side)
    return ids.to(policy.device), mask.to(policy.device)
