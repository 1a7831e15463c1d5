"""Sequences that grow together: the policy draws some tokens, others are put behind them, and so on.

What has been said is held as keys and values and never computed again. Rows are kept right-aligned and without gaps
whenever tokens follow, so that windows reach as far back as they should.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from midtune.model.policy import Policy
from midtune.rollout.boundary import positions
from midtune.rollout.keys_values import shared_prompts
from midtune.rollout.sampler import ROOM, Sampling, choose, ends_of, padded


@dataclass(frozen=True)
class Drawn:
    """Tokens that the policy drew in one go, with their log-probs and the entropies they were drawn from."""

    ids: list[int]
    log_probs: list[float]
    entropies: list[float]


class Stream:
    """Rows of tokens that have been said.

    Args:
        policy: its model is in evaluation mode as long as the stream is used.
        prompts: token ids of what each group begins with.
        group_size: rows of each prompt, adjacent.
    """

    def __init__(self, policy: Policy, prompts: Sequence[list[int]], group_size: int) -> None:
        self.policy = policy
        self._cache = shared_prompts(ROOM)
        ids, self._mask = padded(policy, [*prompts], "left")
        self._logits = self._said(ids, self._mask).repeat_interleave(group_size, 0)
        self._cache.batch_repeat_interleave(group_size)
        self._mask = self._mask.repeat_interleave(group_size, 0)

    def draw(self, sampling: Sampling, most: Sequence[int], luck: torch.Tensor | None) -> list[Drawn]:
        """Draw tokens for every row until it ends or has as many as it may; its last token is not said yet.

        Args:
            most: tokens of each row.
            luck: [T, B], the random number of each token; greedily there is none.
        """
        rows, longest = len(most), max(most)
        device = self._mask.device
        limits = torch.tensor(most, device=device)
        ids = torch.full((rows, longest), self.policy.tokenizer.pad_token_id, device=device)
        log_probs = torch.zeros(rows, longest, device=device)
        entropies = torch.zeros_like(log_probs)
        lengths = torch.zeros_like(limits)
        ends, warpers = ends_of(self.policy, sampling), sampling.warpers()
        going = torch.ones_like(limits, dtype=torch.bool)
        for step in range(longest):
            found = choose(self._logits, sampling.temperature, warpers, None if luck is None else luck[step])
            for held, values in zip((ids, log_probs, entropies), found, strict=True):
                held[going, step] = values[going]
            lengths += going
            going = going & ~ends(ids[:, : step + 1]) & (lengths < limits)
            if not going.any():
                break
            # Rows that have ended wait, behind a gap.
            self._mask = torch.cat([self._mask, going[:, None].to(self._mask)], 1)
            self._logits = self._said(ids[:, step : step + 1], self._mask)
        kept = zip(ids.tolist(), log_probs.tolist(), entropies.tolist(), lengths.tolist(), strict=True)
        return [Drawn(*(values[:length] for values in row)) for *row, length in kept]

    def go_on(self, rows: Sequence[int], said: Sequence[list[int]]) -> None:
        """Keep some rows, and say tokens in them that were not drawn, after the last one that was.

        Args:
            rows: their numbers, rising.
            said: at least one token for each of them.
        """
        kept = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(kept)
        self._mask = self._mask[kept]
        self._close_up()
        if max(map(len, said)) > 1:
            ids, mask = padded(self.policy, [tokens[:-1] for tokens in said], "right")
            self._mask = torch.cat([self._mask, mask], 1)
            self._said(ids, self._mask)
            self._close_up()
        # The last tokens by themselves, as logits are wanted of no others.
        ids, mask = padded(self.policy, [tokens[-1:] for tokens in said], "right")
        self._mask = torch.cat([self._mask, mask], 1)
        self._logits = self._said(ids, self._mask)

    def _said(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Say the tokens [B, T] of the last columns of `mask`; returns the logits [B, V] behind the last one."""
        logits: torch.Tensor = self.policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, -ids.size(1) :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _close_up(self) -> None:
        """Move every row's tokens to the right, in their order, and drop columns that none is left in."""
        order = self._mask.argsort(dim=1, stable=True)[:, -int(self._mask.sum(1).max()) :]
        self._mask = self._mask.gather(1, order)
        for layer in self._cache.layers:
            layer.select_tokens(order)
