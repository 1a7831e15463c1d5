"""The decode engine: every step has the shapes of the step before, and the host hardly steers.

Rows sit in slots, and the number of slots is one of few, so a card may record the step once and replay it (graphs.py).
Tokens, lengths and which rows go on stay on the device; the host looks every few steps. Then rows that have ended make
room for waiting prompts, or the step gets smaller. `decoding.Decoder` does the same plainly, and is the reference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from midtune.errors import one_line
from midtune.model.blocks import captured
from midtune.model.memory import is_out_of_memory
from midtune.model.policy import Policy
from midtune.rollout.boundary import positions
from midtune.rollout.decoding import Decoder, Drawn, Ends, choose
from midtune.rollout.graphs import OnItsWay, Replayed
from midtune.rollout.sampling import Sampling, SamplingLimits, padded
from midtune.rollout.slots import NotInSlots, Pass, Seats, Slots, bucket

# Steps between two looks on a card. Where reading costs nothing, the host looks after every step.
STEPS_UNSEEN = 8
# Share of the rows that has to be free before waiting prompts take their room.
LEAST_FREE = 0.25
# Columns that slots begin with, unless fewer do.
FIRST_COLUMNS = 64
# Prompts and what is fed after each drawn token, to compare with the plain decoder.
CHECKED = [[3, 5, 7, 9, 4], [4, 6, 3]], [[5], [6, 8], [3, 4, 7], [9]]
# Largest difference of logits that rounding explains, as a share of the largest logit.
MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class State:
    """What the device knows of S slots, each [S]; an idle slot has no row and does not go on."""

    row: torch.Tensor  # the row in it; the number of rows if idle
    length: torch.Tensor  # tokens fed after the prompt
    token: torch.Tensor  # drawn last
    drawn: torch.Tensor  # tokens drawn in this call
    most: torch.Tensor  # tokens that may be drawn in this call
    going: torch.Tensor  # bool
    recent: torch.Tensor  # [S, K], the last tokens drawn, as far as stop strings reach


class Drawing:
    """A call of `draw`: how tokens are drawn, and what has been drawn for R rows; a row R takes what is nobody's."""

    def __init__(
        self, policy: Policy, sampling: Sampling, limits: Sequence[int], uniforms: torch.Tensor | None
    ) -> None:
        device, rows, longest = policy.device, len(limits), max(limits)
        self.temperature, self.warpers = sampling.temperature, sampling.warpers()
        self.ends = Ends(policy, sampling)
        self.uniforms = None if uniforms is None else torch.cat([uniforms, uniforms[:, :1]], 1)
        self.rows, self.longest, self.limits = rows, longest, [*limits, 0]
        self.ids = torch.full((rows + 1, longest), policy.tokenizer.pad_token_id, device=device)
        self.log_probs = torch.zeros(rows + 1, longest, device=device)
        self.entropies = torch.zeros_like(self.log_probs)
        self.lengths = torch.zeros(rows + 1, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows + 1, dtype=torch.bool, device=device)

    def rows_of(self, slots: Sequence[tuple[int, int] | None]) -> list[int]:
        """The row in each slot, and R where there is none."""
        return [self.rows if slot is None else slot[0] for slot in slots]

    def state(
        self, old: State | None, order: torch.Tensor, slots: Sequence[tuple[int, int] | None], kept: int
    ) -> State:
        """The state of slots with these rows, of which the first `kept` were the slots `order` and are in the draw."""
        device = order.device
        row = torch.tensor(self.rows_of(slots), device=device)
        zero = torch.zeros_like(row)
        most = torch.tensor(self.limits, device=device)[row]
        made = State(
            row, zero, zero.clone(), zero.clone(), most, row < self.rows, self.ends.nothing(len(slots))
        )
        if old is not None:
            for name in ("length", "token", "drawn", "going", "recent"):
                getattr(made, name)[:kept] = getattr(old, name)[order[:kept]]
        return made

    def pick(self, state: State, logits: torch.Tensor, at: slice) -> None:
        """Draw a token for each of the slots `at` from logits [·, V]; changes the state in place."""
        row, place, going = state.row[at], state.drawn[at], state.going[at]
        place = place.clamp(max=self.longest - 1)
        uniforms = None if self.uniforms is None else self.uniforms[place, row]
        tokens, log_probs, entropies = choose(logits, self.temperature, self.warpers, uniforms)
        row = torch.where(going, row, self.rows)
        for kept, new in ((self.ids, tokens), (self.log_probs, log_probs), (self.entropies, entropies)):
            kept[row, place] = new
        recent = torch.cat([state.recent[at, 1:], tokens[:, None]], 1)
        stopped = going & self.ends(recent)
        self.ended[row] = stopped
        drawn = state.drawn[at] + going
        self.lengths[row] = drawn
        state.token[at], state.recent[at], state.drawn[at] = tokens, recent, drawn
        state.going[at] = going & ~stopped & (drawn < state.most[at])

    def result(self) -> Drawn:
        found = (self.ids, self.log_probs, self.entropies, self.lengths, ~self.ended)
        return Drawn(*(part[: self.rows] for part in found))


class Engine:
    """Rows that grow together; see `decoding.Decoder`, which has the same arguments and methods.

    At most `groups` of the N groups are in flight at a time (None: all). With `watched`, the states that enter this
    block are kept on `storage`. `replayed` calls the steps, if they are to be recorded.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        group_size: int,
        *,
        groups: int | None = None,
        watched: int | None = None,
        storage: torch.device | None = None,
        replayed: Replayed | None = None,
    ) -> None:
        self.policy = policy
        self._ids, self._mask, self._group_size = prompt_ids, prompt_mask, group_size
        self._waiting = deque(range(len(prompt_ids)))
        self._most_rows = (groups or len(prompt_ids)) * group_size
        self._watched = None if watched is None else policy.blocks[watched]
        self._storage = storage or prompt_ids.device
        self._prompt_states: list[tuple[list[int], torch.Tensor]] = []
        # For each step, the rows and places of the tokens fed, and their states.
        self._token_states: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._cache = Slots(policy.model)
        # The row in each slot and its group, and the group whose prompt is at each place of the cache; None: idle.
        self._rows: list[tuple[int, int] | None] = []
        self._prompts: list[int | None] = []
        self._state: State
        self._seats: Seats
        self._width = 0
        # Tokens fed to the longest slot, or more; and the most it can come to in this draw.
        self._longest = self._most_fed = 0
        self._replayed = replayed
        self._unseen = STEPS_UNSEEN if prompt_ids.device.type == "cuda" else 1
        self._ahead: OnItsWay | None = None

    def draw(
        self, sampling: Sampling, limits: Sequence[int], uniforms: torch.Tensor | None, *, leave: bool
    ) -> Drawn:
        drawing = self._drawing = Drawing(self.policy, sampling, limits, uniforms)
        # The last token drawn is not fed.
        self._most_fed = self._longest + drawing.longest - 1
        if self._prompts:
            self._begin_again()
        else:
            self._width = bucket(min(self._most_fed + 1, FIRST_COLUMNS))
            self._turn_over([])
        try:
            while any(going := self._look()) or self._waiting:
                if leave:
                    self._turn_over(going)
                for _ in range(self._unseen):
                    self._make_room(1)
                    self._step()
        finally:
            # The record holds memory that the update needs.
            self._forget()
        return drawing.result()

    def states(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that entered the watched block, of prompts [N, P, H] and of `longest` tokens of each row."""
        storage = self._storage
        pinned = storage != self.policy.device
        first = self._prompt_states[0][1]
        if len(self._prompt_states) == 1:
            prompts = first
        else:
            prompts = first.new_zeros(len(self._ids), *first.shape[1:], pin_memory=pinned)
            for numbers, states in self._prompt_states:
                prompts[torch.tensor(numbers, device=storage)] = states
        rows = len(self._ids) * self._group_size
        # Pinned memory returns to the device faster. The last row is nobody's.
        tokens = first.new_zeros(rows + 1, longest, first.size(-1), pin_memory=pinned)
        for row, place, states in self._token_states:
            tokens[row, place.clamp(max=longest - 1)] = states
        return prompts, tokens[:rows]

    def follow(self, rows: Sequence[int], said: Sequence[list[int]]) -> None:
        """Keep the rows of these ascending numbers, and feed each one or more tokens after its last drawn one."""
        self._seat(list(rows), [])
        self._rows = [None if slot is None else (row, slot[1]) for row, slot in enumerate(self._rows)]
        first = [tokens[:-1] for tokens in said]
        if any(first):
            self._feed(first)
        # Feed the last tokens separately: only their logits are needed.
        self.logits = self._feed([tokens[-1:] for tokens in said])[: len(rows)]

    def _begin_again(self) -> None:
        """Let every row draw again, from the logits of what it was told."""
        state, drawing = self._state, self._drawing
        rows = drawing.rows_of(self._rows)
        state.row.copy_(torch.tensor(rows))
        state.most.copy_(torch.tensor([drawing.limits[row] for row in rows]))
        state.drawn.zero_()
        state.going.copy_(state.row < drawing.rows)
        state.recent = drawing.ends.nothing(len(rows))
        drawing.pick(state, self.logits, slice(0, drawing.rows))

    def _turn_over(self, going: list[bool]) -> None:
        """Let waiting groups take the places of rows that have ended, or make the step smaller."""
        live = [slot for slot, goes in enumerate(going) if goes]
        free = self._most_rows - len(live)
        # Seating rows copies all keys and values.
        count = free // self._group_size if free >= self._most_rows * LEAST_FREE else 0
        groups = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        # Recording a step takes as long as a few of them: halve what is recorded, or leave it.
        most = len(going) - 1 if self._replayed is None else len(going) // 2
        if groups or bucket(len(live)) <= most:
            # Only prompts that rows continue keep their places.
            held = {found[1] for slot in live if (found := self._rows[slot]) is not None}
            self._prompts = [prompt if prompt in held else None for prompt in self._prompts]
            logits = self._prefill(groups) if groups else None
            size = self._group_size
            self._seat(live, [(group * size + i, group) for group in groups for i in range(size)])
            if logits is not None:
                new = slice(len(live), len(live) + len(groups) * size)
                self._drawing.pick(self._state, logits.repeat_interleave(size, 0), new)

    def _prefill(self, groups: list[int]) -> torch.Tensor:
        """Pass whole prompts, and hold their keys and values → the logits of their last tokens."""
        ids, mask = self._ids[groups], self._mask[groups]
        cache = DynamicCache()
        with captured(self._watched, storage=self._storage) as states:
            logits = self.policy.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=True,
                logits_to_keep=1,
                **{self.policy.cache_argument: cache},
            ).logits[:, -1]
        if self._watched is not None:
            self._prompt_states.append((groups, states[0]))
        known = len(self._prompts)
        places = [place for place, prompt in enumerate(self._prompts) if prompt is None][: len(groups)]
        more = len(groups) - len(places)
        if known and more:
            self._keep_prompts([*range(known), *[0] * more])
        places += range(known, known + more)
        self._prompts += [None] * more
        for place, group in zip(places, groups, strict=True):
            self._prompts[place] = group
        for layer, filled in zip(self._cache.layers, cache.layers, strict=True):
            layer.put(places, (filled.keys, filled.values), self.policy.compute_dtype)
            filled.keys = filled.values = None
        return logits

    def _keep_prompts(self, places: list[int]) -> None:
        order = torch.tensor(places, device=self._ids.device)
        for layer in self._cache.layers:
            layer.keep_prompts(order)

    def _seat(self, live: list[int], new: list[tuple[int, int]]) -> None:
        """Give the rows of slots `live` and the rows `new` as many slots as it takes, and their prompts places."""
        device, size = self._ids.device, bucket(len(live) + len(new))
        idle = size - len(live) - len(new)
        used = [place for place, prompt in enumerate(self._prompts) if prompt is not None]
        if bucket(len(used)) < len(self._prompts):
            places = used + [used[0]] * (bucket(len(used)) - len(used))
            self._keep_prompts(places)
            self._prompts = [self._prompts[place] for place in used] + [None] * (len(places) - len(used))
        self._rows = [self._rows[slot] for slot in live] + new + [None] * idle
        order = torch.tensor(live + [0] * (size - len(live)), device=device)
        self._resize(order)
        self._state = self._drawing.state(self._state if live else None, order, self._rows, len(live))
        place_of = {prompt: place for place, prompt in enumerate(self._prompts) if prompt is not None}
        members: list[list[int]] = [[] for _ in self._prompts]
        prompt, seat = [0] * size, [0] * size
        for slot, found in enumerate(self._rows):
            if found is not None:
                place = place_of[found[1]]
                prompt[slot], seat[slot] = place, len(members[place])
                members[place].append(slot)
        widest = bucket(max(map(len, members)))
        groups = [0 if number is None else number for number in self._prompts]
        mask = self._mask[groups]
        where = torch.tensor(prompt, device=device)
        self._seats = Seats(
            where,
            torch.tensor(seat, device=device),
            torch.tensor([slots + [0] * (widest - len(slots)) for slots in members], device=device),
            mask,
            positions(mask),
            mask.sum(1)[where],
        )

    def _resize(self, order: torch.Tensor) -> None:
        for layer in self._cache.layers:
            layer.keep_slots(order, self._width)
        # Slots seen before may have moved, and what was recorded points at the old tensors.
        self._ahead = None
        self._forget()

    def _forget(self) -> None:
        if self._replayed is not None:
            self._replayed.forget()

    def _make_room(self, tokens: int) -> None:
        """Widen the slots if they cannot take so many tokens more; the last column is nobody's."""
        # Where the host has not looked, rows may have ended.
        columns = min(self._longest + tokens, self._most_fed) + 1
        if columns > self._width:
            self._width = bucket(columns)
            self._resize(torch.arange(len(self._rows), device=self._ids.device))

    def _step(self) -> None:
        """Feed every row that goes on its last token, and draw the next."""
        self._longest += 1
        if self._replayed is None:
            fed = self._decode()
        else:
            fed = self._replayed(self._decode)
        if fed is not None:
            row, place, states = (part.to(self._storage, non_blocking=True) for part in fed)
            self._token_states.append((row, place, states))

    def _decode(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The step itself, in tensors of fixed places and shapes."""
        state, drawing = self._state, self._drawing
        columns = torch.where(state.going, state.length, self._width - 1)
        with captured(self._watched) as states:
            logits = self._forward(state.token[:, None], columns[:, None], state.length[:, None])
        fed = None
        if self._watched is not None:
            row = torch.where(state.going, state.row, drawing.rows)
            fed = row, (state.drawn - 1).clamp(min=0), states[0][:, 0]
        state.length += state.going
        drawing.pick(state, logits, slice(None))
        return fed

    def _feed(self, said: Sequence[list[int]]) -> torch.Tensor:
        """Feed each row some tokens or none → the logits of the last column [S, V]."""
        most = max(map(len, said))
        self._most_fed = self._longest + most
        self._make_room(most)
        self._longest += most
        state = self._state
        ids, mask = padded(self.policy, [*said, *[[]] * (len(self._rows) - len(said))], "right")
        ahead = torch.arange(most, device=ids.device)
        columns = torch.where(mask.bool(), state.length[:, None] + ahead, self._width - 1)
        count = mask.sum(1)
        last = state.length[:, None] + torch.minimum(ahead, (count[:, None] - 1).clamp(min=0))
        logits = self._forward(ids, columns, last)
        state.length += count
        return logits

    def _forward(self, ids: torch.Tensor, columns: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self._cache.feed(ids, Pass(self._seats, columns, last, self._width))

    def _look(self) -> list[bool]:
        """Read which slots go on, and how long the longest is; on a card, as it was a look ago if that is known."""
        now = torch.stack([self._state.going.long(), self._state.length])
        seen: Any = now
        since = 0
        if now.device.type == "cuda":
            ahead = OnItsWay(now)
            seen, since = (ahead, 0) if self._ahead is None else (self._ahead, self._unseen)
            self._ahead = ahead
        going, lengths = seen.tolist()
        self._longest = min(self._longest, max(lengths) + since)
        return [bool(goes) for goes in going]


def checked_rows(policy: Policy) -> list[list[list[int]]]:
    """Two prompts, and tokens that follow each twice, to compare ways of computing on."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    return [[[token % vocabulary for token in row] for row in rows] for rows in CHECKED]


def check_engine(policy: Policy) -> None:
    """Compare logits with the plain decoder's; raises NotInSlots if the engine does not serve this model."""
    prompts, said = checked_rows(policy)
    ids, mask = padded(policy, prompts, "left")
    found = []
    for make in (Decoder, Engine):
        try:
            decoder = make(policy, ids, mask, len(said) // len(prompts))
            decoder.draw(Sampling(1, temperature=0), [1] * len(said), None, leave=False)
            decoder.follow(range(len(said)), said)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # An unknown architecture may raise anything.
            raise NotInSlots(one_line(str(error))) from error
        found.append(decoder.logits.float())
    apart = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    if not apart <= MOST_ERROR[policy.compute_dtype]:
        raise NotInSlots(f"its logits differ by {apart:.0e} of the largest")


def serves(policy: Policy, limits: SamplingLimits) -> bool:
    """Whether the engine samples for this policy, which is tried once; says so if it does not."""
    if limits.plain:
        return False
    if policy.in_slots is None:
        try:
            check_engine(policy)
            policy.in_slots = True
        except NotInSlots as error:
            policy.in_slots = False
            if limits.rows.on_message is not None:
                limits.rows.on_message(
                    f"{policy.source.name} is sampled by the plain decoder, which is slower on a card: {error}."
                )
    return policy.in_slots
