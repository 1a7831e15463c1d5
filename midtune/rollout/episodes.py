"""Episodes: the policy acts, the environment answers, turn by turn, in one growing sequence of tokens.

Tokens the policy drew are kept as drawn, never retokenized; what the environment shows is appended.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from midtune.errors import InputError
from midtune.model.memory import slices
from midtune.model.policy import Policy
from midtune.rollout.apart import decoder_of
from midtune.rollout.boundary import with_boundary
from midtune.rollout.decoding import Decoder, ready_to_sample
from midtune.rollout.engine import Engine, serves
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits, padded
from midtune.rollout.speech import Speech, Text, prompt_ids
from midtune.tasks import Row
from midtune.tasks.environment import Game

# Episodes started to measure prompt lengths.
EPISODES_READ = 16


@dataclass(frozen=True)
class Turn:
    """One action: the tokens start…stop−1 of a completion."""

    start: int
    stop: int
    state: Hashable  # the environment's when the policy acted
    reward: float  # immediate
    log_probs: list[float] = field(default_factory=list, compare=False)  # [stop − start]
    entropies: list[float] = field(default_factory=list, compare=False)  # [stop − start]


@dataclass
class Episode:
    """An episode: its prompt, then `ids` [C]: the actions of `turns`, and between them what the environment showed."""

    prompt: list[int]
    environment: Any = None
    ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    cut: bool = False  # ran out of tokens

    def act(
        self, ids: list[int], log_probs: list[float], entropies: list[float], state: Hashable, reward: float
    ) -> None:
        """Append an action."""
        start = len(self.ids)
        self.ids += ids
        self.turns.append(Turn(start, len(self.ids), state, reward, log_probs, entropies))

    def begin_at(self, start: int) -> Episode:
        """The same episode with a prompt of `start` tokens; the rest of the prompt opens the completion, as shown."""
        rest = self.prompt[start:]
        turns = [
            replace(turn, start=turn.start + len(rest), stop=turn.stop + len(rest)) for turn in self.turns
        ]
        return replace(self, prompt=self.prompt[:start], ids=rest + self.ids, turns=turns)


@dataclass
class EpisodeSampler:
    """The policy plays an episode in an environment for each prompt; see `Sampler`."""

    policy: Policy
    limits: SamplingLimits
    game: Game
    is_policy: bool = True
    # Each has an environment.
    most_rows: int = 256

    def begin(self, rows: Sequence[Row]) -> Sequence[Row]:
        return self.game.begin(rows)

    def prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        (match,) = self.game.matches(1)
        begun = [match.reset(row) for row in rows[:EPISODES_READ]]
        return [len(prompt_ids(self.policy.tokenizer, row["prompt"])) for row in begun]

    def sample(
        self, prompts: Sequence[Any], sampling: Sampling, *, boundary_block: int | None = None
    ) -> Rollout:
        episodes = with_common_prompts(self.play(prompts, sampling), sampling.group_size)
        return with_boundary(self, rollout_of(self.policy, episodes, sampling.group_size), boundary_block)

    def play(self, prompts: Sequence[Any], sampling: Sampling) -> list[Episode]:
        """Play an episode in every match of the game, turn by turn, as many together as memory holds.

        Every token has its own random number, as in `text.sample`. `prompts` are each match's first text or chat; a
        group's are adjacent, and the game's matches already reset. `sampling.max_new_tokens` limits a whole episode,
        with what environments show. Raises InputError if the environment or the model cannot do what is asked, and
        RunStopped if a single group does not fit into memory.
        """
        game, policy, group_size = self.game, self.policy, sampling.group_size
        chat = not isinstance(prompts[0], str)
        speech: Speech = (
            game.speech(policy) if game.speech else Text(policy, sampling.stop_strings, chat=chat)
        )
        matches, ids = game.matches(len(prompts)), [speech.prompt_ids(prompt) for prompt in prompts]
        most = min(game.turn_tokens or sampling.max_new_tokens, sampling.max_new_tokens)
        uniforms = sampling.uniforms(game.max_turns, most, len(prompts), device=policy.device)

        def together(part: slice, in_slots: bool) -> list[Episode]:
            """Play whole groups to their end."""
            playing, begun = matches[part], ids[part]
            # A group with equal prompts prefills once.
            alike = all(prompt == begun[i - i % group_size] for i, prompt in enumerate(begun))
            shared = group_size if alike else 1
            start = padded(policy, begun[::shared], "left")
            decoder: Engine | Decoder = (
                Engine(policy, *start, shared, replayed=self.limits.replayed(policy))
                if in_slots
                else decoder_of(policy, self.limits.rows.on_message)(policy, *start, shared)
            )
            for match in playing:
                match.rewind()
            episodes = [
                Episode([*prompt], match.environment) for prompt, match in zip(begun, playing, strict=True)
            ]
            live = list(range(len(episodes)))
            for turn in range(game.max_turns):
                left = [min(most, sampling.max_new_tokens - len(episodes[i].ids)) for i in live]
                numbers = None if uniforms is None else uniforms[turn, :, part][:, live]
                states = [playing[i].state for i in live]
                drawn = decoder.draw(sampling, left, numbers, leave=False)
                going, said = [], []
                for row, (i, state, action) in enumerate(zip(live, states, drawn.rows(), strict=True)):
                    episode = episodes[i]
                    reply, reward = speech.answer(playing[i], episode.prompt + episode.ids, action[0])
                    episode.act(*action, state, reward)
                    if reply is None or turn + 1 == game.max_turns:
                        continue
                    episode.cut = len(episode.ids) + len(reply) >= sampling.max_new_tokens
                    if not episode.cut:
                        episode.ids += reply
                        going.append(row)
                        said.append([action[0][-1], *reply])
                if not going:
                    break
                decoder.follow(going, said)
                live = [live[row] for row in going]
            return episodes

        def run(groups: int) -> list[Episode]:
            rows = groups * group_size
            with ready_to_sample(policy, rows, unpack=self.limits.unpack):
                in_slots = serves(policy, self.limits)
                return [
                    episode for part in slices(len(prompts), rows) for episode in together(part, in_slots)
                ]

        return self.limits.rows.fitting(len(prompts) // group_size, group_size, run)


def with_common_prompts(episodes: Sequence[Episode], group_size: int) -> list[Episode]:
    """Give each group the longest common prefix of its prompts as its one prompt; raises InputError if it is empty."""
    found = []
    for start in range(0, len(episodes), group_size):
        group = episodes[start : start + group_size]
        common = len(os.path.commonprefix([episode.prompt for episode in group]))
        if common == 0:
            raise InputError(
                "the episodes of a group begin with different words, so there is nothing to share; begin the row's "
                "prompt with a text that does not depend on the environment."
            )
        found += [episode.begin_at(common) for episode in group]
    return found


@torch.no_grad()
def rollout_of(policy: Policy, episodes: Sequence[Episode], group_size: int) -> Rollout:
    """Whole groups of episodes as one rollout, without boundary states; a group's members share one prompt."""
    prompt_ids, prompt_mask = padded(policy, [episode.prompt for episode in episodes[::group_size]], "left")
    ids, mask = padded(policy, [episode.ids for episode in episodes], "right")
    drawn = torch.zeros(ids.shape, dtype=mask.dtype)
    log_probs, entropies = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, episode in enumerate(episodes):
        for turn in episode.turns:
            place = slice(turn.start, turn.stop)
            drawn[row, place] = 1
            log_probs[row, place] = torch.tensor(turn.log_probs)
            entropies[row, place] = torch.tensor(turn.entropies)
    cut = torch.tensor([episode.cut for episode in episodes])
    log_probs, entropies, cut, drawn = (
        values.to(ids.device) for values in (log_probs, entropies, cut, drawn)
    )
    return Rollout(
        prompt_ids, prompt_mask, ids, mask, log_probs, entropies, cut, drawn=drawn, episodes=episodes
    )
