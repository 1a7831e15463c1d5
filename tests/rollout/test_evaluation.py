from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from midtune.model.policy import Policy
from midtune.rollout import evaluation
from midtune.rollout.evaluation import Evaluation, evaluate, rows_that_fit, score_completions
from midtune.rollout.sampling import Sampling, SamplingLimits
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import TextSampler, sample
from midtune.tasks import Row
from tests.plain import stop_early
from tests.tight import memory_for

# Neither rising nor falling in length.
QUESTIONS = ["two words", "a", "a question of many words", "some words", "b"]


@pytest.fixture
def policy(load: Callable[..., Policy]) -> Policy:
    policy = load("qwen3", "none")
    stop_early(policy)
    return policy


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(evaluation, "MOST_ROWS", getattr(request, "param", 2))


def rows() -> list[Row]:
    return [
        {"prompt": [{"role": "user", "content": question}], "question": question, "answer": str(number)}
        for number, question in enumerate(QUESTIONS)
    ]


def by_answer(answer: list[str], **_: Any) -> list[float]:
    return [float(text) for text in answer]


def by_place(completions: list[Any], **_: Any) -> list[float]:
    """0, 1, 2… for the completions of one call."""
    return [float(place) for place in range(len(completions))]


def run(policy: Policy, score: Callable[..., Any], **settings: Any) -> Evaluation:
    """The scores by a policy, or by a sampler of its own limits."""
    sampler = settings.pop("sampler", None) or TextSampler(policy, SamplingLimits())
    return evaluate(sampler, rows(), score, Sampling(max_new_tokens=6), **{"samples": 0, **settings})


def test_scores_are_in_the_order_of_the_rows(policy: Policy) -> None:
    found = run(policy, by_answer, samples=1)
    assert found.greedy.tolist() == [0, 1, 2, 3, 4]
    assert found.sampled is not None
    assert found.sampled.tolist() == [0, 1, 2, 3, 4]


def test_completions_are_those_of_each_row_alone(policy: Policy) -> None:
    alone = [
        sample(
            policy,
            [prompt_ids(policy.tokenizer, row["prompt"])],
            Sampling(max_new_tokens=6, temperature=0),
        )
        for row in rows()
    ]
    expected = [policy.tokenizer.decode(found.completions()[0], skip_special_tokens=True) for found in alone]
    assert run(policy, by_answer).completions == expected


def test_a_sampled_score_is_the_mean_of_a_rows_samples(policy: Policy) -> None:
    # Four samples leave room for one problem in a call: its scores are 0, 1, 2 and 3.
    sampler = TextSampler(policy, SamplingLimits(), most_rows=4)
    found = run(policy, by_place, sampler=sampler, samples=4)
    assert found.sampled is not None
    assert found.sampled.tolist() == [1.5] * 5


def test_problems_that_wait_take_the_room_of_those_that_end(policy: Policy) -> None:
    passes: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        passes[-1] += kwargs["input_ids"].size(1) == 1

    found = []
    with policy.model.register_forward_pre_hook(count, with_kwargs=True):
        for most_rows in (2, 1024):
            passes.append(0)
            sampler = TextSampler(policy, SamplingLimits(), most_rows=most_rows)
            found.append(run(policy, by_answer, sampler=sampler))
    assert found[0].completions == found[1].completions
    assert passes[1] < passes[0]


def test_what_goes_together_changes_no_sample(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    two = run(policy, score, samples=2).samples
    monkeypatch.setattr(evaluation, "MOST_ROWS", 256)
    assert np.array_equal(two, run(policy, score, samples=2).samples)  # type: ignore[arg-type]


def test_no_samples_give_no_sampled_score(policy: Policy) -> None:
    assert run(policy, by_answer, samples=0).sampled is None


def test_a_reward_of_none_counts_as_zero(policy: Policy) -> None:
    found = run(policy, lambda completions, **_: [None] * len(completions))
    assert found.greedy.tolist() == [0] * 5


def test_the_random_state_of_the_caller_is_left_alone(policy: Policy) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(policy, by_answer, samples=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_fixes_the_samples(policy: Policy) -> None:
    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    first, second, other = (run(policy, score, samples=2, seed=seed).sampled for seed in (1, 1, 2))
    assert np.array_equal(first, second)  # type: ignore[arg-type]
    assert not np.array_equal(first, other)  # type: ignore[arg-type]


def test_progress_counts_every_completion(policy: Policy) -> None:
    counts: list[tuple[int, int]] = []
    run(policy, by_answer, samples=2, on_problems=lambda *done: counts.append(done))
    assert sum(problems for problems, _ in counts) == 5 + 5 * 2
    assert all(tokens >= problems for problems, tokens in counts)


def test_a_reward_gets_chats_texts_ids_and_columns_as_trl_gives_them() -> None:
    given: dict[str, Any] = {}

    def score(**arguments: Any) -> list[float]:
        given.update(arguments)
        return [0.5, 1.0]

    chat = [{"role": "user", "content": "1+1"}]
    found = score_completions(
        score,
        [{"prompt": chat, "answer": "2"}, {"prompt": "3+3=", "answer": "6"}],
        ["two", "six"],
        [[4, 5], [6]],
    )
    assert found == [0.5, 1.0]
    assert given == {
        "prompts": [chat, "3+3="],
        "completions": [[{"role": "assistant", "content": "two"}], "six"],
        "completion_ids": [[4, 5], [6]],
        "answer": ["2", "6"],
    }


@pytest.mark.parametrize("small_batches", [8], indirect=True)
def test_rows_on_a_gpu_are_as_many_as_a_third_of_its_free_memory_holds(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keys and values of 4 blocks × 2 heads × 32 values × 100 tokens in bf16, and 20 bytes a logit.
    row_bytes = 2 * 4 * 2 * 32 * 100 * 2 + 20 * 260
    on_gpu: Any = SimpleNamespace(
        device=torch.device("cuda"), model=policy.model, num_blocks=4, compute_dtype=torch.bfloat16
    )

    def fitting(free_bytes: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 2 * free_bytes))
        return rows_that_fit(on_gpu, 100)

    assert fitting(3 * 5 * row_bytes) == 5
    assert fitting(3 * 5 * row_bytes - 3) == 4
    assert fitting(100) == 1
    assert fitting(3 * 100 * row_bytes) == 8


@pytest.mark.parametrize("small_batches", [256], indirect=True)
def test_memory_that_runs_out_changes_no_score(policy: Policy) -> None:
    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    expected = run(policy, score, samples=4)
    counts: list[tuple[int, int]] = []
    sampler = TextSampler(policy, SamplingLimits())
    with memory_for(policy, 4) as refused:
        found = run(policy, score, sampler=sampler, samples=4, on_problems=lambda *done: counts.append(done))
    assert refused == [5]
    assert sampler.limits.rows.rows == 2
    assert np.array_equal(found.greedy, expected.greedy)
    assert np.array_equal(found.sampled, expected.sampled)  # type: ignore[arg-type]
    assert found.completions == expected.completions
    assert sum(problems for problems, _ in counts) == 5 + 5 * 4
