"""Rewards as a task has them: one's own, several, and those that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.tasks import Reward, check_reward
from midtune.tasks.rewards import named, parts_of
from tests.tasks.toy_data import load


def test_ones_own_reward_is_also_the_score_and_needs_no_answers(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(completions, topic): return [len(t) for t in topic]")
    (tmp_path / "data.csv").write_text("prompt,topic\n" + "".join(f"p{n},t\n" for n in range(6)))
    data = tmp_path / "data.csv"
    mine = load(data, reward=f"{tmp_path / 'own.py'}:f", answer_column="answer")
    assert mine.reward is mine.score
    assert mine.own_reward
    check_reward(mine)
    with pytest.raises(InputError, match="`verifier` exists for reasoning-gym tasks and task files"):
        load(data, reward="verifier", answer_column="topic")
    with pytest.raises(
        InputError,
        match="no reward `f1`; the rewards are exact, numeric, math, verifier, code, code-all, format,",
    ):
        load(data, reward="f1")


def test_rewards_add_up_by_weights_and_the_score_is_that_of_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\n" + "".join(f"p{n},{n}\n" for n in range(6)))

    def shaping(name: str) -> Reward:
        return named(lambda completions, **_: [None if not c else -1.0 * len(c) for c in completions], name)

    both = load(path, reward=["length=0.5", "numeric=3"], shaping=shaping)
    columns = {"prompts": ["?"] * 3, "completions": ["12", "7", ""], "answer": ["12", "12", "12"]}
    assert both.reward(**columns) == [0.5 * -2 + 3, -0.5, 0.0]
    assert both.score(**columns) == [1.0, 0.0, 0.0]
    assert both.reward.__name__ == "length+numeric"
    rewards, weights = parts_of(both.reward)
    assert ([reward.__name__ for reward in rewards], weights) == (["length", "numeric"], [0.5, 3.0])
    check_reward(both)
    alone = load(path, reward="numeric")
    assert parts_of(alone.reward) == ([alone.reward], [1.0])
    lighter = load(path, reward=["length=0.4", "numeric=3"], shaping=shaping)
    assert len({alone.fingerprint, both.fingerprint, lighter.fingerprint}) == 3
    with pytest.raises(InputError, match="length shapes completions but judges no answers"):
        load(path, reward=["length"], shaping=shaping)
    with pytest.raises(InputError, match="asked for twice"):
        load(path, reward=["math", "math=2"])
