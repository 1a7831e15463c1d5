"""Decoders for models whose cache holds more than keys and values, or cannot be used at all; slower, and exact.

A recurrent state takes in every token that is fed, so padding must never be. Prompts of different lengths are prefilled
apart, and a turn begins with whole rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from midtune.model.memory import is_out_of_memory
from midtune.model.policy import Policy
from midtune.rollout.boundary import MOST_APART, plain_log_probs
from midtune.rollout.decoding import Decoder, Drawn
from midtune.rollout.engine import checked_rows
from midtune.rollout.keys_values import RoomyLayer, joined, with_states
from midtune.rollout.sampling import Rollout, Sampling, padded


class ApartDecoder(Decoder):
    """Prefills rows of one length together, and decodes all rows together; see `Decoder`."""

    how = "with prompts of different lengths prefilled apart, because it has recurrent states."

    def _prefill(self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, group_size: int) -> None:
        prompts = [ids[mask.bool()] for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        self._begin(prompts, group_size)

    def draw(self, *args: Any, **kwargs: Any) -> Drawn:
        self._drawn = super().draw(*args, **kwargs)
        return self._drawn

    def follow(self, rows: Sequence[int], said: Sequence[list[int]]) -> None:
        drawn = self._drawn
        ids = [
            torch.cat(
                [self._rows[row], drawn.ids[row, : drawn.lengths[row] - 1], drawn.ids.new_tensor(tokens)]
            )
            for row, tokens in zip(rows, said, strict=True)
        ]
        self._begin(ids, 1)

    def _begin(self, rows: Sequence[torch.Tensor], group_size: int) -> None:
        """Feed whole rows, each of which is then repeated for its group."""
        self.fed = []
        self._rows = [row for row in rows for _ in range(group_size)]
        lengths = [len(row) for row in rows]
        order: list[int] = []
        caches, logits = [], []
        for length in sorted(set(lengths)):
            numbers = [number for number, other in enumerate(lengths) if other == length]
            order += numbers
            self._cache = with_states(self.policy.model.config, self._room)
            self.attends = any(isinstance(layer, RoomyLayer) for layer in self._cache.layers)
            self._mask = torch.ones(len(numbers), length, dtype=torch.long, device=rows[0].device)
            logits.append(
                self._forward(torch.stack([rows[number] for number in numbers]), self._mask.cumsum(1) - 1)
            )
            caches.append(self._cache)
        back = torch.tensor(order, device=rows[0].device).argsort()
        self._cache = joined(caches)
        self._cache.batch_select_indices(back)
        self.logits = torch.cat(logits)[back]
        self._mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        if group_size > 1:
            self._cache.batch_repeat_interleave(group_size)
            self.logits, self._mask = (x.repeat_interleave(group_size, 0) for x in (self.logits, self._mask))


class WholeDecoder(ApartDecoder):
    """Computes whole rows again for every token, without a cache; see `Decoder`."""

    how = "without a cache, which is slow, because its own does not give the model's log-probs."

    def _begin(self, rows: Sequence[torch.Tensor], group_size: int) -> None:
        self.fed = []
        self._rows = [row for row in rows for _ in range(group_size)]
        self._ids = pad_sequence(self._rows, True, 0, "right")
        self._mask = pad_sequence([torch.ones_like(row) for row in self._rows], True, 0, "right")
        self.logits = self._last()

    def _keep(self, kept: torch.Tensor) -> None:
        self._ids, self._mask = self._ids[kept], self._mask[kept]

    def _feed_drawn(self, tokens: torch.Tensor, going: torch.Tensor) -> torch.Tensor:
        place = self._mask.sum(1, keepdim=True)
        self._ids, self._mask = (
            torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (self._ids, self._mask)
        )
        self._ids.scatter_(1, place, tokens[:, None])
        self._mask.scatter_(1, place, going[:, None].to(self._mask))
        return self._last()

    def _last(self) -> torch.Tensor:
        found = self.policy.tail(0, None)(input_ids=self._ids, use_cache=False)[0]
        last = self._mask.sum(1) - 1
        return self.policy.logits(found[torch.arange(len(last), device=last.device), last])


def decoder_of(policy: Policy, on_message: Callable[[str], None] | None = None) -> type[Decoder]:
    """The fastest decoder that draws with the plain model's log-probs, which is tried once; says so if it is slower."""
    if policy.decoder is None:
        exact = (make for make in (Decoder, ApartDecoder) if _is_exact(policy, make))
        policy.decoder = next(exact, WholeDecoder)
        if policy.decoder is not Decoder and on_message is not None:
            on_message(f"{policy.source.name} is sampled {policy.decoder.how}")
    found: type[Decoder] = policy.decoder
    return found


@torch.no_grad()
def _is_exact(policy: Policy, make: type[Decoder]) -> bool:
    """Whether ragged rows, of which some wait and all go on, are drawn with the plain model's log-probs."""
    prompts, said = checked_rows(policy)
    greedy, limits, group_size = Sampling(8, temperature=0), [8, 1, 2, 8], len(said) // len(prompts)
    # A least time step, as in Zamba2 and Nemotron-H, is left out by transformers' decode step, and rarely reached.
    if any(getattr(part, "time_step_limit", (0,))[0] > 0 for part in policy.model.modules()):
        return False
    try:
        with policy.autocast():
            decoder = make(policy, *padded(policy, prompts, "left"), group_size)
            first = decoder.draw(greedy, limits, None, leave=False).rows()
            decoder.follow(range(len(said)), said)
            drawn = decoder.draw(greedy, limits, None, leave=True)
    except Exception as error:
        # An unknown architecture may raise anything.
        if is_out_of_memory(error):
            raise
        return False
    begun = [
        [*prompts[row // group_size], *ids[:-1], *fed]
        for row, ((ids, *_), fed) in enumerate(zip(first, said, strict=True))
    ]
    mask = (torch.arange(max(limits), device=policy.device) < drawn.lengths[:, None]).long()
    found = drawn.log_probs, drawn.entropies, drawn.cut
    right = plain_log_probs(policy, Rollout(*padded(policy, begun, "left"), drawn.ids, mask, *found))
    return float((drawn.log_probs - right)[mask.bool()].abs().mean()) <= MOST_APART[policy.compute_dtype]
