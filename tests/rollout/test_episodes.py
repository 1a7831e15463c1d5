from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.rl.tail import completion_log_probs
from midtune.rollout.boundary import with_boundary
from midtune.rollout.episodes import (
    Episode,
    EpisodeSampler,
    Turn,
    rollout_of,
    with_common_prompts,
)
from midtune.rollout.sampling import Sampling, SamplingLimits
from midtune.rollout.text import TextSampler, sample
from midtune.tasks.environment import Game, Match
from tests.conftest import ARCHITECTURES
from tests.plain import plain_log_probs, stop_early
from tests.rollout.corridor import ROWS, Corridor
from tests.tight import memory_for

Load = Callable[..., Policy]
GROUP = 3


def played(
    policy: Policy,
    *,
    turn_tokens: int | None = 4,
    limits: SamplingLimits | None = None,
    **settings: Any,
) -> list[Episode]:
    """Two episodes more than one for each of the rows' groups: lengths and numbers of turns differ."""
    game = Game("the corridor", Corridor, max_turns=4, turn_tokens=turn_tokens)
    rows = [row for row in ROWS[:4] for _ in range(GROUP)]
    matches = game.matches(len(rows))
    begun = [match.reset(row)["prompt"] for match, row in zip(matches, rows, strict=True)]
    torch.manual_seed(0)
    sampling = Sampling(**{"max_new_tokens": 60, "group_size": GROUP, **settings})
    return EpisodeSampler(policy, limits or SamplingLimits(), game).play(begun, sampling)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_the_plain_models_on_the_same_tokens(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    stop_early(policy)
    episodes = played(policy, temperature=0.8)
    assert len({len(episode.turns) for episode in episodes}) > 1
    assert len({len(episode.ids) for episode in episodes}) > 3
    rollout = rollout_of(policy, episodes, GROUP)
    with torch.no_grad():
        log_probs, entropies = plain_log_probs(policy, rollout, 0.8)
    drawn = rollout.scored
    assert 0 < int(drawn.sum()) < int(rollout.completion_mask.sum())
    for found, expected in ((rollout.log_probs, log_probs), (rollout.entropies, entropies)):
        torch.testing.assert_close(found, expected * drawn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_the_update_gives_the_plain_models_log_probs_and_gradients(load: Load, architecture: str) -> None:
    ours, plain = load(architecture, "none"), load(architecture, "none")
    stop_early(ours)
    ours.thaw(2)
    plain.thaw(2)
    rollout = with_boundary(TextSampler(ours, SamplingLimits()), rollout_of(ours, played(ours), GROUP), 2)
    weights = torch.linspace(-1, 1, rollout.completion_ids.numel()).view_as(rollout.completion_ids)
    found, _ = completion_log_probs(ours, rollout, temperature=1.0)
    expected, _ = plain_log_probs(plain, rollout, 1.0)
    expected = expected * rollout.scored
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = plain.trained_parameters()
    for name, parameter in ours.trained_parameters().items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4)


def test_a_single_turn_is_what_the_sampler_draws(load: Load) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    episodes = played(policy, temperature=0, max_new_tokens=7, turn_tokens=None)
    prompts = [episode.prompt for episode in episodes[::GROUP]]
    expected = sample(policy, prompts, Sampling(7, temperature=0, group_size=GROUP)).completions()
    firsts = [episode.ids[: episode.turns[0].stop] for episode in episodes]
    assert firsts == expected


def test_tokens_stay_as_they_were_drawn_and_replies_stand_between_them(load: Load) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    for episode in played(policy):
        corridor = Match("the corridor", Corridor())
        width = len(policy.tokenizer.decode(episode.prompt).partition(" ")[0]) // 4
        corridor.reset({"prompt": "", "width": width})
        end = 0
        for turn in episode.turns:
            assert turn.state == corridor.state
            action = episode.ids[turn.start : turn.stop]
            text, reward = corridor.step(policy.tokenizer.decode(action, skip_special_tokens=True).strip())
            assert turn.reward == pytest.approx(reward)
            end = turn.stop
            shown = policy.tokenizer.decode(episode.ids[end : end + len(f"\n{text}")])
            assert shown in (f"\n{text}", "")
        assert end == len(episode.ids)


def test_an_episode_without_tokens_left_is_cut(load: Load) -> None:
    episodes = played(load("qwen3", "none"), max_new_tokens=9)
    assert any(episode.cut for episode in episodes)
    assert all(len(episode.ids) < 9 + 1 for episode in episodes)
    assert all(episode.turns[-1].stop == len(episode.ids) for episode in episodes)


def test_a_seed_fixes_an_episode_whatever_plays_beside_it(load: Load) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    together = played(policy)
    limits = SamplingLimits()
    limits.rows.rows = GROUP
    assert [episode.ids for episode in played(policy, limits=limits)] == [episode.ids for episode in together]


def test_episodes_begin_again_where_memory_ran_out(load: Load) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    expected = [(episode.ids, episode.turns) for episode in played(policy)]
    limits, passes = SamplingLimits(), itertools.count()
    # In the second turn: prompts pass once, and an action of four tokens three times.
    with memory_for(policy, 2 * GROUP, lambda hidden: next(passes) > 8) as refused:
        found = played(policy, limits=limits)
    assert [(episode.ids, episode.turns) for episode in found] == expected
    assert len(refused) == 1 and refused[0] > 2 * GROUP
    assert limits.rows.rows == 2 * GROUP


def test_a_group_shares_what_its_prompts_have_in_common(load: Load) -> None:
    turn = Turn(0, 2, "here", 1.0, [-0.5, -1.0], [0.25, 0.5])
    episodes = [Episode(prompt, ids=[7, 8], turns=[turn]) for prompt in ([1, 2, 3], [1, 2, 4, 5])]
    a, b = with_common_prompts(episodes, 2)
    assert a.prompt == b.prompt == [1, 2]
    assert (a.ids, b.ids) == ([3, 7, 8], [4, 5, 7, 8])
    assert (a.turns, b.turns) == ([Turn(1, 3, "here", 1.0)], [Turn(2, 4, "here", 1.0)])
    rollout = rollout_of(load("qwen3", "none"), [a, b], 2)
    assert rollout.scored.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert rollout.log_probs.tolist() == [[0.0, -0.5, -1.0, 0.0], [0.0, 0.0, -0.5, -1.0]]
    assert rollout.entropies.tolist() == [[0.0, 0.25, 0.5, 0.0], [0.0, 0.0, 0.25, 0.5]]
    with pytest.raises(InputError, match="begin with different words"):
        with_common_prompts([Episode([1]), Episode([2])], 2)


def test_prompts_that_go_on_differently_are_scored_alike(load: Load) -> None:
    policy = load("qwen3", "none")
    stop_early(policy)
    game = Game("the corridor", Corridor, max_turns=3, turn_tokens=4)
    matches = game.matches(2)
    begun = [match.reset(row)["prompt"] for match, row in zip(matches, ROWS[:2], strict=True)]
    sampler = EpisodeSampler(policy, SamplingLimits(), game)
    rollout = sampler.sample(begun, Sampling(40, group_size=2))
    assert len(rollout.prompt_ids) == 1
    with torch.no_grad():
        log_probs, _ = plain_log_probs(policy, rollout, 1.0)
    torch.testing.assert_close(rollout.log_probs, log_probs * rollout.scored, atol=1e-4, rtol=1e-4)
