from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from midtune.errors import RunStopped
from midtune.model.policy import Policy
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits
from midtune.rollout.text import AlikeSampler, FirstRollouts, TextSampler, sample
from tests.conftest import ARCHITECTURES
from tests.plain import PROMPTS, plain_log_probs, sampled, stop_early
from tests.tight import anything, memory_for, prefill

Load = Callable[..., Policy]


@pytest.fixture
def policy(load: Load) -> Policy:
    return load("qwen3", "none")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate_on_one_prompt_at_a_time(load: Load, architecture: str) -> None:
    policy = load(architecture)
    stops = stop_early(policy)
    found = sample(policy, PROMPTS, Sampling(max_new_tokens=12, temperature=0)).completions()
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=stops,
            pad_token_id=0,
        )
        assert completion == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_and_entropies_of_sampled_tokens_are_the_models(
    load: Load, architecture: str, temperature: float
) -> None:
    policy = load(architecture)
    stop_early(policy)
    rollout = sampled(policy, temperature=temperature)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2
    with torch.no_grad():
        log_probs, entropies = plain_log_probs(policy, rollout, temperature)
    torch.testing.assert_close(rollout.log_probs, log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.entropies, entropies, atol=1e-5, rtol=1e-5)


def test_every_row_of_a_group_follows_its_own_prompt(policy: Policy) -> None:
    alone = [
        sample(policy, [prompt], Sampling(max_new_tokens=8, temperature=0)).completions()[0]
        for prompt in PROMPTS
    ]
    together = sampled(policy, max_new_tokens=8, temperature=0).completions()
    assert together == [completion for completion in alone for _ in range(3)]


def test_a_completion_ends_with_its_first_stop_token(policy: Policy) -> None:
    stops = stop_early(policy)
    completions = sampled(policy).completions()
    assert all(token not in stops for ids in completions for token in ids[:-1])
    assert all(ids[-1] in stops or len(ids) == 12 for ids in completions)
    cut = sampled(policy).cut.tolist()
    assert cut == [ids[-1] not in stops for ids in completions]
    assert len({ids[-1] for ids in completions if ids[-1] in stops}) > 1


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(policy: Policy) -> None:
    def completion(**settings: Any) -> list[int]:
        torch.manual_seed(0)
        return sample(policy, PROMPTS[:1], Sampling(40, **settings)).completions()[0]

    free = completion()
    texts = [policy.tokenizer.decode(free[: i + 1]) for i in range(len(free))]
    # Two characters of a token each.
    place = next(i for i in range(3, 40) if texts[i][-2:].isprintable() and texts[i][-2:].isascii())
    stop = texts[place][-2:]
    assert stop not in texts[place - 1]
    assert completion(stop_strings=("never that", stop)) == free[: place + 1]


def test_a_stop_string_in_the_prompt_ends_nothing(policy: Policy) -> None:
    last = policy.tokenizer.decode(PROMPTS[0][-1:])
    found = sample(policy, PROMPTS[:1], Sampling(6, stop_strings=(last + "zzz",)))
    assert found.completion_ids.size(1) == 6


def test_nothing_follows_a_stop_token(policy: Policy) -> None:
    stop_early(policy)
    rollout = sampled(policy)
    after = rollout.completion_mask == 0
    assert after.any()
    assert (rollout.completion_ids[after] == policy.tokenizer.pad_token_id).all()
    assert (rollout.log_probs[after] == 0).all()


def test_completions_are_cut_at_max_new_tokens(policy: Policy) -> None:
    policy.model.generation_config.eos_token_id = None
    policy.tokenizer.eos_token = None
    assert [len(ids) for ids in sampled(policy, max_new_tokens=5).completions()] == [5] * 12


def test_a_rollout_is_as_wide_as_its_longest_completion(policy: Policy) -> None:
    policy.model.generation_config.eos_token_id = list(range(260))
    assert sampled(policy).completion_ids.shape == (12, 1)


def test_top_k_of_one_is_greedy(policy: Policy) -> None:
    greedy = sampled(policy, temperature=0)
    assert sampled(policy, top_k=1).completions() == greedy.completions()


def test_tokens_of_a_rollout_are_distributed_as_the_model_says(policy: Policy) -> None:
    prompt = PROMPTS[0]
    torch.manual_seed(0)
    rollout = sample(policy, [prompt], Sampling(2, temperature=0.4, group_size=4000))
    first, second = rollout.completion_ids.T
    common = int(first.mode().values)
    # The first tokens, and what follows the commonest of them.
    for drawn, context in ((first, prompt), (second[first == common], [*prompt, common])):
        with torch.no_grad():
            probs = (policy.model(torch.tensor([context])).logits[0, -1] / 0.4).softmax(-1).double()
        expected = probs * len(drawn)
        observed = torch.bincount(drawn, minlength=len(probs)).double()
        often = expected >= 5
        merged = [torch.cat([x[often], x[~often].sum()[None]]).numpy() for x in (observed, expected)]
        assert len(merged[0]) > 5
        assert chisquare(merged[0], merged[1] * merged[0].sum() / merged[1].sum()).pvalue > 0.001


def test_policies_that_answer_at_different_length_draw_by_the_same_numbers(policy: Policy) -> None:
    free = sampled(policy, seed=4)
    after_free = torch.rand(1)
    stop_early(policy)
    cut = sampled(policy, seed=4)
    assert torch.equal(torch.rand(1), after_free)
    assert cut.completion_mask.sum() < free.completion_mask.sum()
    both = cut.completion_mask.bool()
    assert torch.equal(cut.completion_ids[both], free.completion_ids[:, : both.size(1)][both])


def test_the_same_seed_gives_the_same_rollout(policy: Policy) -> None:
    first, second, other = (sampled(policy, seed=seed).completion_ids for seed in (4, 4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_sampling_leaves_no_hook_behind(policy: Policy) -> None:
    sampled(policy, boundary_block=1)
    assert not policy.blocks[1]._forward_pre_hooks


# When memory runs out.


def assert_equal_rollouts(found: Rollout, expected: Rollout) -> None:
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.boundary is not None and expected.boundary is not None
    assert found.boundary.block == expected.boundary.block
    prompt_tokens = expected.prompt_mask.bool()
    for part, whole in (
        (found.log_probs, expected.log_probs),
        (found.entropies, expected.entropies),
        (found.boundary.prompt[prompt_tokens], expected.boundary.prompt[prompt_tokens]),
        (found.boundary.completion, expected.boundary.completion),
    ):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(
    ("rows", "during", "refused", "fitting"),
    [(6, anything, 1, 6), (3, anything, 2, 3), (2, prefill, 1, 6), (1, prefill, 2, 3)],
)
def test_memory_that_runs_out_changes_no_token(
    load: Load, quantize: str, rows: int, during: Any, refused: int, fitting: int
) -> None:
    policy = load("qwen3", quantize)
    stop_early(policy)
    expected = sampled(policy, boundary_block=2)
    after = torch.rand(1)
    said: list[str] = []
    limits = SamplingLimits()
    limits.rows.on_message = said.append
    policy.model.train()
    with memory_for(policy, rows, during) as found:
        rollout = sampled(policy, boundary_block=2, limits=limits)
        assert len(found) == refused
        assert_equal_rollouts(rollout, expected)
        assert torch.equal(torch.rand(1), after)
        # What fitted is where the next rollout begins.
        assert_equal_rollouts(sampled(policy, boundary_block=2, limits=limits), expected)
        assert len(found) == refused
    assert limits.rows.rows == fitting
    assert said[-1].endswith(f"from now on at most {fitting} go together.")
    assert policy.model.training
    assert not policy.blocks[2]._forward_pre_hooks
    assert not any("forward" in vars(part) for part in policy.model.modules())


def test_slices_of_unequal_length_are_padded_alike(policy: Policy) -> None:
    stop_early(policy)
    expected = sampled(policy, boundary_block=1, seed=3)
    longest = expected.completion_mask.sum(1).view(-1, 3).amax(1)
    assert len(set(longest.tolist())) > 1
    limits = SamplingLimits()
    limits.rows.rows = 3
    assert_equal_rollouts(sampled(policy, boundary_block=1, seed=3, limits=limits), expected)


def test_a_group_that_does_not_fit_ends_the_run(policy: Policy) -> None:
    with memory_for(policy, 2), pytest.raises(RunStopped, match="a single group of 3 completions; lower"):
        sampled(policy)


def test_alike_runs_share_their_first_rollout_and_go_on_alike(load: Load) -> None:
    first: FirstRollouts = {}
    found = []
    for block in (1, 3):
        policy = load("qwen3", "none")
        stop_early(policy)
        sampler = AlikeSampler(TextSampler(policy, SamplingLimits()), first, seed=5)
        torch.manual_seed(block)
        prompts = [prompt for prompt in ("one", "three") for _ in range(2)]
        sampling = Sampling(6, group_size=2)
        found.append([sampler.sample(prompts, sampling, boundary_block=block) for _ in range(2)])
    for one, other in zip(*found, strict=True):
        assert one.completions() == other.completions()
        assert (one.boundary.block, other.boundary.block) == (1, 3)
    assert found[0][0].completions() != found[0][1].completions()
