"""Episodes of several turns: the policy samples an action, an environment answers, until it is over.

Each episode is one sequence, [prompt | action | observation | action …]. What was sampled is never tokenised
again, and observations are no part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from midtune.errors import InputError
from midtune.model.memory import slices
from midtune.model.policy import Policy
from midtune.rollout.boundary import recompute
from midtune.rollout.evaluation import MOST_ROWS, Evaluation, prompt_ids
from midtune.rollout.sampler import Rollout, Sampling, padded, sample
from midtune.tasks.environments import Environment, Episode

Prompt = str | list[dict[str, str]]
_ACTION = "<<<action>>>"


@dataclass
class Episodes:
    """Episodes of N rows, G each; those of a row are adjacent.

    Attributes:
        rollout: their sequences; observations are masked out by its `action_mask`, and their log-probs and
            entropies are 0.
        spans: of each episode, where the tokens of each action begin and end in the completion.
        states: of each episode, the state in which each step was taken.
        rewards: of each episode, the reward of each step.
    """

    rollout: Rollout
    spans: list[list[tuple[int, int]]]
    states: list[list[Hashable]]
    rewards: list[list[float]]

    def returns(self) -> list[float]:
        """The sum of the rewards of each episode."""
        return [sum(own) for own in self.rewards]

    def per_token(self, steps: Sequence[Iterable[float]]) -> torch.Tensor:
        """A value for each step of each episode, on all tokens of its action: [N·G, C] fp32, 0 elsewhere."""
        values = torch.zeros_like(self.rollout.log_probs)
        for row, (own, spans) in enumerate(zip(steps, self.spans, strict=True)):
            for value, (start, stop) in zip(own, spans, strict=True):
                values[row, start:stop] = float(value)
        return values


def play(
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    make: Callable[[], Environment],
    sampling: Sampling,
    *,
    max_turns: int,
    group_size: int = 1,
    boundary_block: int | None = None,
) -> Episodes:
    """Play `group_size` episodes of every row, all that are still going a turn at a time.

    Args:
        rows: each with its `prompt`; the rest goes to `Environment.reset`.
        make: called once an episode.
        sampling: how an action is drawn; `max_new_tokens` and `stop_strings` are those of one action.
        max_turns: where an episode is cut.
        boundary_block: have the states that enter this block, from one pass when all episodes have ended.

    Raises:
        InputError: the environment does not do what it has to, or episodes of one row began differently.
    """
    tokenizer = policy.tokenizer
    episodes = [Episode(make, row) for row in rows for _ in range(group_size)]
    prompts = []
    for number, row in enumerate(rows):
        first = {episode.observation for episode in episodes[number * group_size :][:group_size]}
        if len(first) > 1:
            raise InputError(
                "Environment.reset observed different things with one row; put what makes episodes differ, such as a "
                "seed, into the rows."
            )
        prompts.append(prompt_ids(tokenizer, opened(row["prompt"], first.pop())))
    chats = [not isinstance(row["prompt"], str) for row in rows]
    # Of each episode: token ids, whether each was sampled, its log-prob and its entropy.
    tokens: list[list[tuple[int, int, float, float]]] = [[] for _ in episodes]
    spans: list[list[tuple[int, int]]] = [[] for _ in episodes]
    going = list(range(len(episodes)))
    for turn in range(max_turns):
        if turn == 0:
            sampled = sample(policy, prompts, sampling, group_size=group_size)
        else:
            contexts = [prompts[i // group_size] + [token[0] for token in tokens[i]] for i in going]
            sampled = sample(policy, contexts, sampling)
        scored_rows = zip(sampled.log_probs.tolist(), sampled.entropies.tolist(), strict=True)
        for i, action, (log_probs, entropies) in zip(going, sampled.completions(), scored_rows, strict=True):
            begin = len(tokens[i])
            scored = zip(action, log_probs, entropies)  # noqa: B905 (the scores are padded)
            tokens[i] += [(token, 1, log_prob, entropy) for token, log_prob, entropy in scored]
            spans[i].append((begin, len(tokens[i])))
            episodes[i].act(tokenizer.decode(action, skip_special_tokens=True).strip())
        going = [i for i in going if not episodes[i].done]
        if not going or turn + 1 == max_turns:
            break
        for i in going:
            begin, end = spans[i][-1]
            action = [token[0] for token in tokens[i][begin:end]]
            chat = chats[i // group_size]
            ids = observation_ids(policy, str(episodes[i].observation), action, chat=chat)
            tokens[i] += [(token, 0, 0.0, 0.0) for token in ids]

    prompt, prompt_mask = padded(policy, prompts, "left")
    completions, mask = padded(policy, [[token[0] for token in own] for own in tokens], "right")
    action_mask, log_probs = torch.zeros_like(mask), torch.zeros(mask.shape, device=mask.device)
    entropies = torch.zeros_like(log_probs)
    for number, own in enumerate(tokens):
        _, was_sampled, *scores = zip(*own, strict=True)
        action_mask[number, : len(own)] = torch.tensor(was_sampled)
        log_probs[number, : len(own)], entropies[number, : len(own)] = torch.tensor(scores)
    boundary = None
    if boundary_block is not None:
        boundary = recompute(policy, boundary_block, prompt, prompt_mask, completions, mask)
    return Episodes(
        Rollout(prompt, prompt_mask, completions, mask, log_probs, entropies, boundary, action_mask),
        spans,
        [episode.states for episode in episodes],
        [episode.rewards for episode in episodes],
    )


def evaluate_episodes(
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    make: Callable[[], Environment],
    sampling: Sampling,
    *,
    max_turns: int,
    samples: int,
    seed: int = 0,
    on_problems: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `policy` by the sum of rewards of an episode of each row, greedily and by sampling.

    Args:
        samples: episodes per row at the training temperature; 0 plays none.
        seed: of the samples; the caller's random state is left as it was.
        on_problems: called with the episodes finished since the last call and the tokens sampled in them.
    """

    def run(draws: int, how: Sampling) -> tuple[list[list[float]], list[str]]:
        scores: list[list[float]] = []
        texts: list[str] = []
        for part in slices(len(rows), max(1, MOST_ROWS // draws)):
            found = play(policy, rows[part], make, how, max_turns=max_turns, group_size=draws)
            scores += np.reshape(found.returns(), (-1, draws)).tolist()
            ids = found.rollout.completions()[::draws]
            texts += policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
            if on_problems is not None:
                on_problems(len(found.rewards), int(found.rollout.sampled_mask.sum()))
        return scores, texts

    greedy, completions = run(1, replace(sampling, temperature=0.0))
    drawn = None
    if samples:
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            drawn = np.array(run(samples, sampling)[0])
    sampled = None if drawn is None else drawn.mean(axis=1)
    return Evaluation(np.array(greedy)[:, 0], sampled, completions, drawn)


def opened(prompt: Prompt, observation: str | None) -> Prompt:
    """The prompt with the first observation under it: of a chat, in its last message."""
    if observation is None:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{observation}"
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']}\n{observation}"}]


def observation_ids(policy: Policy, observation: str, action: Sequence[int], *, chat: bool) -> list[int]:
    """The tokens between an action and the next one.

    Args:
        action: token ids of the action before.
        chat: the observation is the user's next message; otherwise lines of its own.
    """
    tokenizer = policy.tokenizer
    if chat:
        messages = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": _ACTION},
            {"role": "user", "content": observation},
        ]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        between = text.rpartition(_ACTION)[2]
        if action[-1] in policy.stop_token_ids:
            # What the model has said to end its message is not said again.
            between = between.removeprefix(str(tokenizer.decode(action[-1:])))
    else:
        ended = str(tokenizer.decode(list(action), skip_special_tokens=True)).endswith("\n")
        between = f"{observation}\n" if ended else f"\n{observation}\n"
    ids: list[int] = tokenizer(between, add_special_tokens=False)["input_ids"]
    return ids
