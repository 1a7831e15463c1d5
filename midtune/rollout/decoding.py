"""The decode step: one token for every row in flight, from cached keys and values.

Each prompt is prefilled once and its group shares its cache. Rows that end either leave the batch, or wait behind a
gap for an environment's answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, StopStringCriteria

from midtune.device import free_bytes
from midtune.model.norms import fused_norms
from midtune.model.policy import Policy, full_precision
from midtune.model.quantize import unpacked
from midtune.rollout.boundary import positions
from midtune.rollout.keys_values import closed_up, shared_prompts
from midtune.rollout.sampling import Sampling, padded

# Tokens of the vocabulary whose probabilities are summed together first; most vocabularies are a multiple.
PART = 128
# Spare tokens to allocate for keys and values.
ROOM = 128


@dataclass
class Drawn:
    """Tokens drawn for B rows; after a row's last token, values are undefined if rows wait, padding if they leave."""

    ids: torch.Tensor  # [B, T]
    log_probs: torch.Tensor  # [B, T]
    entropies: torch.Tensor  # [B, T]
    lengths: torch.Tensor  # [B]
    cut: torch.Tensor  # [B] bool, rows that reached their limit

    def rows(self) -> list[tuple[list[int], list[float], list[float]]]:
        """Ids, log-probs and entropies of each row, up to its length."""
        columns = (self.ids, self.log_probs, self.entropies)
        rows = zip(*(values.tolist() for values in columns), self.lengths.tolist(), strict=True)
        return [(ids[:n], log_probs[:n], entropies[:n]) for ids, log_probs, entropies, n in rows]


class Decoder:
    """A batch of token rows that grow together; the policy's model must stay in evaluation mode.

    Prompts are [N, P], left-padded; the `group_size` rows of each are adjacent. Keys and values get `room` more tokens.
    """

    # Without keys there is nothing to mask, and some architectures then take the mask for that of the new tokens.
    attends = True

    def __init__(
        self,
        policy: Policy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        group_size: int,
        room: int = ROOM,
    ) -> None:
        self.policy, self._room = policy, room
        # For each pass after prefill, the numbers of its rows.
        self.fed: list[torch.Tensor] = []
        self._prefill(prompt_ids, prompt_mask, group_size)

    def _prefill(self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, group_size: int) -> None:
        self._cache = shared_prompts(self._room)
        self._mask = prompt_mask
        self.logits = self._forward(prompt_ids, positions(prompt_mask)).repeat_interleave(group_size, 0)
        self._cache.batch_repeat_interleave(group_size)
        self._mask = prompt_mask.repeat_interleave(group_size, 0)

    def draw(
        self,
        sampling: Sampling,
        limits: Sequence[int],
        uniforms: torch.Tensor | None,
        *,
        leave: bool,
        on_tokens: Callable[[torch.Tensor], None] | None = None,
    ) -> Drawn:
        """Draw tokens for every row until it ends or reaches its limit [B]; does not feed its last token yet.

        `uniforms` is [T, B], one U(0, 1) per token; None when greedy. Rows that end `leave` the batch, or wait for
        `follow`. `on_tokens` is called with each step's tokens, of the rows in the batch.
        """
        rows, longest, device = len(limits), max(limits), self._mask.device
        ids = torch.full((rows, longest), self.policy.tokenizer.pad_token_id, device=device)
        log_probs = torch.zeros(rows, longest, device=device)
        entropies = torch.zeros_like(log_probs)
        most = torch.tensor(limits, device=device)
        lengths = torch.zeros_like(most)
        ended = torch.zeros_like(most, dtype=torch.bool)
        ends, warpers = Ends(self.policy, sampling), sampling.warpers()
        live, going = torch.arange(rows, device=device), ~ended
        for step in range(longest):
            tokens, log_probs[live, step], entropies[live, step] = choose(
                self.logits,
                sampling.temperature,
                warpers,
                None if uniforms is None else uniforms[step, live],
            )
            ids[live, step] = tokens
            if on_tokens is not None:
                on_tokens(tokens)
            lengths[live] += going
            stopped = going & ends(ids[live, : step + 1])
            ended[live] |= stopped
            going = going & ~stopped & (lengths[live] < most[live])
            if not going.any():
                break
            if leave and not going.all():
                kept = closed_up(going)
                self._keep(kept)
                live, tokens, going = live[kept], tokens[kept], going[kept]
            self.logits = self._feed_drawn(tokens, going)
            self.fed.append(live)
        return Drawn(ids, log_probs, entropies, lengths, ~ended)

    def follow(self, rows: Sequence[int], said: Sequence[list[int]]) -> None:
        """Keep the rows of these ascending numbers, and feed each one or more tokens after its last drawn one."""
        self._keep(torch.tensor(rows, device=self._mask.device))
        self._close_up()
        if max(map(len, said)) > 1:
            self._feed([tokens[:-1] for tokens in said])
            self._close_up()
        # Feed the last tokens separately: only their logits are needed.
        self.logits = self._feed([tokens[-1:] for tokens in said])

    def _keep(self, kept: torch.Tensor) -> None:
        self._cache.batch_select_indices(kept)
        self._mask = self._mask[kept]

    def _feed_drawn(self, tokens: torch.Tensor, going: torch.Tensor) -> torch.Tensor:
        """Feed every row one token [B], which counts for rows that are `going` only; returns logits [B, V]."""
        position = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, going[:, None].to(self._mask)], 1)
        return self._forward(tokens[:, None], position)

    def _feed(self, said: Sequence[list[int]]) -> torch.Tensor:
        ids, mask = padded(self.policy, said, "right")
        self._mask = torch.cat([self._mask, mask], 1)
        return self._forward(ids, positions(self._mask)[:, -ids.size(1) :])

    def _forward(self, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Feed the tokens [B, T] of the mask's last columns; returns the last one's logits [B, V]."""
        logits: torch.Tensor = self.policy.model(
            input_ids=ids,
            attention_mask=self._mask if self.attends else None,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.policy.cache_argument: self._cache},
        ).logits
        return logits[:, -1]

    def _close_up(self) -> None:
        """Move every row's tokens right, in order, so that attention windows reach back as far as they should."""
        order = self._mask.argsort(dim=1, stable=True)[:, -int(self._mask.sum(1).max()) :]
        self._mask = self._mask.gather(1, order)
        for layer in self._cache.layers:
            layer.select_tokens(order)


def choose(
    logits: torch.Tensor, temperature: float, warpers: LogitsProcessorList, uniforms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a token from each row of logits [B, V] → token ids, log-probs and entropies, all [B].

    Log-probs and entropies are fp32, of the full distribution at the temperature (1 if it is 0, greedy).
    `uniforms` is [B], one U(0, 1) per row; None when greedy.
    """
    with full_precision(logits.device):
        logits = logits.float()
        log_probs = (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)
        probs = log_probs.exp()
        if uniforms is None:
            tokens = log_probs.argmax(-1)
        elif warpers:
            # Warpers read only the scores.
            tokens = _inverse_cdf(warpers(None, log_probs).softmax(-1), uniforms)
        else:
            tokens = _inverse_cdf(probs, uniforms)
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0]
        # 0 · log 0 is 0.
        entropies = -torch.linalg.vecdot(probs, log_probs.clamp_(min=torch.finfo(torch.float32).min))
        return tokens, chosen, entropies


def _inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Invert the CDF: the token of each row [B, V] where the cumulative probability passes its number [B] → [B].

    Finds a part of the vocabulary, then the token in it: running sums over all of it take several times as long.
    """
    if missing := -probs.size(-1) % PART:
        probs = torch.nn.functional.pad(probs, (0, missing))
    parts = probs.unflatten(-1, (-1, PART))
    # On a card, the order of a sum depends on the number of rows, which must not change a token.
    sums = parts.sum(-1, dtype=torch.float64 if probs.device.type == "cuda" else None)
    sums = sums.cumsum(-1, dtype=torch.float64)
    aim = uniforms[:, None] * sums[:, -1:]
    part = _passing(sums, aim)
    before = torch.nn.functional.pad(sums, (1, 0)).gather(-1, part)
    within = parts.gather(1, part[..., None].expand(-1, -1, PART))[:, 0].cumsum(-1, dtype=torch.float64)
    return (part * PART + _passing(before + within, aim))[:, 0]


def _passing(sums: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """Where rising sums [B, n] pass `aim` [B, 1] → [B, 1]; where the last rise is, if they do not."""
    last = sums[:, -1:]
    return torch.searchsorted(sums, torch.minimum(aim, last.nextafter(torch.zeros_like(last))), right=True)


class Ends:
    """Tells which completions end with their last token: at a stop token, or with the end of a stop string."""

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        self._stop_ids = torch.tensor(policy.stop_token_ids, device=policy.device)
        strings = list(sampling.stop_strings)
        self._texts = StopStringCriteria(policy.tokenizer, strings) if strings else None

    def nothing(self, rows: int) -> torch.Tensor:
        """Tokens [B, K] of rows that have none yet; K is how far back stop strings reach."""
        reach = 1 if self._texts is None else self._texts.maximum_token_len
        # Beyond any vocabulary, which the criteria take for a token that is in no stop string.
        return torch.full((rows, reach), torch.iinfo(torch.int32).max, device=self._stop_ids.device)

    def __call__(self, completions: torch.Tensor) -> torch.Tensor:
        """Completions so far, or their last K tokens [B, ·] → bool [B]."""
        # For many stop tokens, torch.isin sorts on a card, and the host waits.
        ended = (completions[:, -1:] == self._stop_ids).any(-1)
        return ended if self._texts is None else ended | self._texts(completions, None)


@contextlib.contextmanager
def ready_to_sample(policy: Policy, rows: int, *, unpack: bool = True) -> Iterator[None]:
    """Turn off dropout and gradients; with `unpack`, unpack weights into at most half the free memory."""
    room = free_bytes(policy.device) // 2 if unpack else 0
    on_card, training = policy.device.type == "cuda", policy.model.training
    policy.model.eval()
    try:
        with (
            torch.no_grad(),
            unpacked(policy.model, policy.compute_dtype, rows=rows, most_bytes=room),
            policy.autocast(),
            # A CPU has no such kernel.
            fused_norms(policy.model, policy.compute_dtype) if on_card else contextlib.nullcontext(),
        ):
            yield
    finally:
        policy.model.train(training)
