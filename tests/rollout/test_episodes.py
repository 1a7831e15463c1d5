from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.rollout.episodes import Episodes, observation_ids, opened, play
from midtune.rollout.sampler import Sampling
from tests.plain import plain_log_probs, stop_early
from tests.rollout.counting import Counting

Load = Callable[..., Policy]
CHAT = [{"role": "user", "content": "count"}]
ROWS: list[dict[str, Any]] = [{"prompt": CHAT, "turns": 3}, {"prompt": "on and on", "turns": 9}]


@pytest.fixture
def policy(load: Load) -> Policy:
    policy = load("qwen3", "none")
    stop_early(policy)
    return policy


def played(policy: Policy, make: Any = Counting, **settings: Any) -> Episodes:
    torch.manual_seed(0)
    given = {"max_turns": 4, "group_size": 2, "boundary_block": 2, **settings}
    return play(policy, ROWS, make, Sampling(max_new_tokens=5), **given)


def test_episodes_end_when_they_are_over_or_at_the_last_turn(policy: Policy) -> None:
    found = played(policy)
    assert [len(own) for own in found.rewards] == [3, 3, 4, 4]
    assert [len(own) for own in found.states] == [len(own) for own in found.spans] == [3, 3, 4, 4]
    # The state is the one before the step: how often the steps before it moved on.
    for states, rewards in zip(found.states, found.rewards, strict=True):
        assert states == [sum(rewards[:step]) for step in range(len(rewards))]
    assert found.returns() == [sum(own) for own in found.rewards]
    assert len(set(found.returns())) > 1


def test_a_sequence_is_what_was_sampled_and_observed_in_turn(policy: Policy) -> None:
    found = played(policy)
    tokenizer, rollout = policy.tokenizer, found.rollout
    begins = [ids[mask.bool()] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert [tokenizer.decode(ids) for ids in begins] == ["count\nof 3>", "on and on\nof 9"]
    for row, (spans, ids) in enumerate(zip(found.spans, rollout.completions(), strict=True)):
        sampled = [place for start, stop in spans for place in range(start, stop)]
        assert rollout.sampled_mask[row].nonzero()[:, 0].tolist() == sampled
        assert spans[0][0] == 0 and spans[-1][1] == len(ids)
        moved = 0
        for (_, stop), (start, _), reward in zip(spans, spans[1:], found.rewards[row], strict=False):
            moved += int(reward)
            observed = tokenizer.decode(ids[stop:start])
            assert observed == (f"at {moved}>" if row < 2 else f"\nat {moved}\n")


def test_log_probs_and_entropies_are_those_of_the_whole_sequence(policy: Policy) -> None:
    rollout = played(policy).rollout
    with torch.no_grad():
        expected = plain_log_probs(policy, rollout, 1.0)
    mask = rollout.sampled_mask
    assert 0 < mask.sum() < rollout.completion_mask.sum()
    torch.testing.assert_close(rollout.log_probs, expected[0] * mask, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.entropies, expected[1] * mask, atol=1e-4, rtol=1e-4)


def test_values_of_steps_are_spread_over_their_actions(policy: Policy) -> None:
    found = played(policy)
    values = found.per_token([[1.0 + step for step in range(len(own))] for own in found.rewards])
    for row, spans in enumerate(found.spans):
        for step, (start, stop) in enumerate(spans):
            assert set(values[row, start:stop].tolist()) == {1.0 + step}
    assert not values[found.rollout.sampled_mask == 0].any()


def test_the_first_observation_goes_under_the_prompt() -> None:
    assert opened("a", None) == "a"
    assert opened("a", "b") == "a\nb"
    system = {"role": "system", "content": "s"}
    assert opened([system, *CHAT], "b") == [system, {"role": "user", "content": "count\nb"}]
    assert CHAT[0]["content"] == "count"


def test_a_message_that_the_model_has_ended_is_not_ended_again(policy: Policy) -> None:
    tokenizer = policy.tokenizer
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    policy.model.generation_config.eos_token_id = 2
    try:
        going, ended = ([50, 51], [50, 2])
        found = [observation_ids(policy, "wall", action, chat=True) for action in (going, ended)]
    finally:
        tokenizer.chat_template = kept
    assert tokenizer.decode(found[1]) == "[user]wall</s>[assistant]"
    assert found[0] == [2, *found[1]]
    line = tokenizer("up\n")["input_ids"]
    assert tokenizer.decode(observation_ids(policy, "wall", line, chat=False)) == "wall\n"


class Wrong(Counting):
    def step(self, action: str) -> Any:
        return "at 0", "much"


class Broken(Counting):
    def step(self, action: str) -> Any:
        raise KeyError(action)


class Unlike(Counting):
    made = 0

    def reset(self, turns: int, **row: object) -> str:
        Unlike.made += 1
        super().reset(turns)
        return str(Unlike.made)


class Unhashable(Counting):
    state = property(lambda self: [self.place])  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Wrong, "it must return a text, a finite reward"),
        (Broken, "Environment.step raised KeyError"),
        (Unlike, "put what makes episodes differ"),
        (Unhashable, "it must be hashable"),
    ],
)
def test_an_environment_that_does_something_else_is_refused(policy: Policy, kind: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        played(policy, kind)
