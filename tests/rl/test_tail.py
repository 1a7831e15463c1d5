"""The tail of the model from boundary states against the whole model, row by row and without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.rl import tail
from midtune.rl.tail import completion_log_probs, packs, tail_kind, tail_note
from midtune.rollout.boundary import with_boundary
from midtune.rollout.sampling import Rollout, Sampling, SamplingLimits
from midtune.rollout.text import TextSampler, sample
from tests.architectures import EVERY
from tests.conftest import ARCHITECTURES, STUDY
from tests.plain import PROMPTS, plain_log_probs, stop_early

Load = Callable[..., Policy]
Scores = tuple[torch.Tensor, torch.Tensor]


def rollout_of(policy: Policy, *, temperature: float = 1.0) -> Rollout:
    """Completions of the policy, which has learned something since."""
    stop_early(policy)
    torch.manual_seed(0)
    rollout = sample(
        policy,
        PROMPTS,
        Sampling(max_new_tokens=12, temperature=temperature, group_size=3),
        boundary_block=policy.trained[0],
    )
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.02 * torch.randn_like(parameter)
    return rollout


def gradient(policy: Policy, scores: Scores) -> torch.Tensor:
    """Of a weighted sum of log-probs, and of entropies where they have one, over all trained parameters."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in scores)
    found = torch.autograd.grad(loss, list(policy.trained_parameters().values()))
    return torch.cat([part.flatten() for part in found])


def assert_same(policy: Policy, found: Scores, expected: Scores) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if not found[1].requires_grad:
        expected = (expected[0], expected[1].detach())
    ours, theirs = gradient(policy, found), gradient(policy, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_gradients_equal_the_whole_models(
    load: Load, architecture: str, quantize: str, block: int
) -> None:
    policy = load(architecture, quantize)
    policy.thaw(block)
    rollout = rollout_of(policy)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


@pytest.mark.parametrize("name", STUDY)
def test_scores_of_the_studys_models_equal_the_whole_models(load: Load, name: str) -> None:
    architecture, shape = STUDY[name]
    policy = load(architecture, **shape)
    policy.thaw(2)
    rollout = rollout_of(policy)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_entropies_have_a_gradient_where_it_is_asked_for(load: Load, architecture: str) -> None:
    policy = load(architecture)
    policy.thaw(2)
    rollout = rollout_of(policy)
    found = completion_log_probs(policy, rollout, temperature=0.7, entropy_gradient=True)
    assert found[1].requires_grad
    assert_same(policy, found, plain_log_probs(policy, rollout, 0.7))
    assert not completion_log_probs(policy, rollout, temperature=0.7)[1].requires_grad


@pytest.mark.parametrize("blocks", [(1, 3), (0, 1, 3)])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "mistral"])
def test_several_blocks_apart(load: Load, architecture: str, blocks: tuple[int, ...]) -> None:
    policy = load(architecture)
    for block in blocks:
        policy.thaw(block)
    rollout = rollout_of(policy)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


@pytest.mark.parametrize("recompute_tokens", [0, 30])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_every_parameter_is_trained(load: Load, architecture: str, tied: bool, recompute_tokens: int) -> None:
    policy = load(architecture, "none", tie_word_embeddings=tied)
    policy.thaw_all()
    rollout = rollout_of(policy)
    found = completion_log_probs(
        policy, rollout, temperature=0.7, entropy_gradient=True, recompute_tokens=recompute_tokens
    )
    assert_same(policy, found, plain_log_probs(policy, rollout, 0.7))


def test_lora(load: Load) -> None:
    policy = load("qwen3")
    policy.add_lora([2], rank=4)
    rollout = rollout_of(policy)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


def test_logits_are_divided_by_the_temperature(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    rollout = rollout_of(policy, temperature=0.7)
    found = completion_log_probs(policy, rollout, temperature=0.7)
    assert_same(policy, found, plain_log_probs(policy, rollout, 0.7))


def test_logits_are_capped_as_the_model_caps_them(load: Load) -> None:
    policy = load("gemma3_text", "none", final_logit_softcapping=1.5)
    policy.thaw(2)
    rollout = rollout_of(policy)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


@pytest.mark.parametrize("recompute_tokens", [0, 40])
@pytest.mark.parametrize("most_padding", [0.15, 1.0])
@pytest.mark.parametrize("kind", [tail.ROWS, tail.WHOLE])
def test_slower_tails_compute_the_same(
    load: Load, kind: str, most_padding: float, recompute_tokens: int
) -> None:
    policy = load("gemma3_text")
    policy.thaw(2)
    rollout = rollout_of(policy)
    policy.tails[2] = kind
    found = completion_log_probs(
        policy,
        rollout,
        temperature=0.7,
        entropy_gradient=True,
        recompute_tokens=recompute_tokens,
        most_padding=most_padding,
    )
    assert_same(policy, found, plain_log_probs(policy, rollout, 0.7))


@pytest.mark.parametrize("kind", [tail.ROWS, tail.WHOLE])
def test_slower_tails_train_every_parameter(load: Load, kind: str) -> None:
    policy = load("qwen3", "none")
    policy.thaw_all()
    rollout = rollout_of(policy)
    policy.tails[0] = kind
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


@pytest.mark.parametrize(
    ("architecture", "block", "kind", "says"),
    [
        ("qwen3", 2, tail.SHARED, []),
        ("lfm2", 2, tail.ROWS, ["The update repeats each prompt for all its completions"]),
        ("gemma4_text", 3, tail.WHOLE, ["The update runs all blocks"]),
    ],
)
def test_the_fastest_tail_that_is_exact_is_taken(
    load: Load, architecture: str, block: int, kind: str, says: list[str]
) -> None:
    policy = load(architecture, **EVERY[architecture])
    policy.thaw(block)
    assert tail_kind(policy, block) == kind
    assert [note.partition(",")[0] for note in tail_note(policy)] == says


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_recomputed_states_serve_as_well_as_captured_ones(load: Load, architecture: str) -> None:
    policy = load(architecture)
    policy.thaw(2)
    rollout = rollout_of(policy)
    again = with_boundary(TextSampler(policy, SamplingLimits()), rollout, 2)
    found = completion_log_probs(policy, again, temperature=1.0)
    assert_same(policy, found, completion_log_probs(policy, rollout, temperature=1.0))


def test_before_any_update_the_scores_are_the_samplers_own(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    torch.manual_seed(0)
    rollout = sample(
        policy, PROMPTS, Sampling(max_new_tokens=12, temperature=0.7, group_size=3), boundary_block=2
    )
    found, _ = completion_log_probs(policy, rollout, temperature=0.7)
    torch.testing.assert_close(found, rollout.log_probs, atol=1e-5, rtol=1e-5)


def test_padding_scores_zero(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    rollout = rollout_of(policy)
    padding = rollout.completion_mask == 0
    assert padding.any()
    for scores in completion_log_probs(policy, rollout, temperature=1.0):
        assert (scores[padding] == 0).all()


def test_a_group_scores_the_same_alone_as_among_longer_ones(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    rollout = rollout_of(policy)
    lengths = rollout.completion_mask.sum(1).view(-1, 3).amax(1)
    shortest = int(lengths.argmin())
    assert lengths[shortest] < rollout.completion_ids.size(1)
    together, _ = completion_log_probs(policy, rollout, temperature=1.0)
    alone, _ = completion_log_probs(policy, rollout.groups(slice(shortest, shortest + 1)), temperature=1.0)
    torch.testing.assert_close(alone, together[3 * shortest : 3 * shortest + 3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute_tokens", [0, 40, 10_000])
@pytest.mark.parametrize("most_padding", [0.0, 0.15, 1.0])
def test_packs_and_recomputation_change_nothing(
    load: Load, most_padding: float, recompute_tokens: int
) -> None:
    policy = load("gemma3_text")
    policy.thaw(1)
    rollout = rollout_of(policy)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 3
    found = completion_log_probs(
        policy, rollout, temperature=1.0, most_padding=most_padding, recompute_tokens=recompute_tokens
    )
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


def test_recomputation_holds_less(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(0)
    rollout = rollout_of(policy)
    held = []
    for recompute_tokens in (0, 1000):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            completion_log_probs(policy, rollout, temperature=1.0, recompute_tokens=recompute_tokens)
        held.append(sum(kept.values()))
    assert held[1] < held[0] / 3


@pytest.mark.parametrize("spread", [2, 10, 100, 1000])
def test_ragged_completions_are_packed_with_little_padding(spread: int) -> None:
    lengths = np.random.default_rng(0).integers(1, spread + 1, size=64).tolist()
    found = packs(lengths, 0.15)
    assert sorted(row for pack in found for row in pack) == list(range(64))
    computed = sum(len(pack) * max(lengths[row] for row in pack) for pack in found)
    assert 1 - sum(lengths) / computed <= 0.15
    assert len(found) <= 14


def test_packs_by_hand() -> None:
    # 10 + 9 + 8 of 30 tokens leave 10% padding; a 7 would make it 15% of 40, a 5 20%.
    assert packs([9, 5, 10, 0, 8, 7], 0.15) == [[2, 0, 4, 5], [1]]
    assert packs([9, 5, 10, 0, 8, 7], 0.1) == [[2, 0, 4], [5], [1]]
    assert packs([9, 5, 10, 0, 8, 7], 1) == [[0, 1, 2, 3, 4, 5]]
    assert packs([0, 0], 0.15) == packs([0, 0], 1) == []
    # At most 20 tokens together, of which each row brings 3 more.
    assert packs([9, 5, 10, 0, 8, 7], 0.9, lambda fed: 20 // (fed + 3)) == [[2], [0], [4], [5, 1]]


def test_one_token_completions(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    rollout = sample(policy, PROMPTS, Sampling(max_new_tokens=1, group_size=3), boundary_block=2)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    assert_same(policy, found, plain_log_probs(policy, rollout, 1.0))


def test_chunks_of_tokens_give_what_one_chunk_gives(load: Load) -> None:
    policy = load("qwen3")
    policy.thaw(2)
    rollout = rollout_of(policy)
    whole = completion_log_probs(policy, rollout, temperature=1.0)
    # Room for seven rows of 260 logits.
    found = completion_log_probs(policy, rollout, temperature=1.0, chunk_values=7 * 260 + 100)
    assert_same(policy, found, whole)


SHAPES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=4),
        "group_size": st.integers(2, 16),
        "max_new_tokens": st.integers(1, 10),
        "temperature": st.sampled_from([0.6, 1.0, 1.5]),
        "block": st.integers(0, 3),
        "architecture": st.sampled_from(sorted(ARCHITECTURES)),
    }
)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shape=SHAPES)
def test_scores_and_gradients_equal_the_whole_models_for_any_shape(load: Load, shape: dict[str, Any]) -> None:
    policy = load(shape["architecture"])
    stop_early(policy)
    policy.thaw(shape["block"])
    torch.manual_seed(0)
    rollout = sample(
        policy,
        [torch.randint(3, 250, (length,)).tolist() for length in shape["lengths"]],
        Sampling(shape["max_new_tokens"], shape["temperature"], group_size=shape["group_size"]),
        boundary_block=shape["block"],
    )
    found = completion_log_probs(policy, rollout, temperature=shape["temperature"])
    assert_same(policy, found, plain_log_probs(policy, rollout, shape["temperature"]))


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 15, 29])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_scores_and_gradients_of_smollm2_equal_the_whole_models(quantize: str, block: int) -> None:
    policy = load_policy(resolve("smollm2-135m"), quantize=quantize, device="cpu")
    policy.thaw(block)
    prompts = [policy.tokenizer(text)["input_ids"] for text in ("12 + 34 =", "Say something long about 7:")]
    torch.manual_seed(0)
    rollout = sample(policy, prompts, Sampling(12, group_size=3), boundary_block=block)
    found = completion_log_probs(policy, rollout, temperature=1.0)
    expected = plain_log_probs(policy, rollout, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    expected = (expected[0], expected[1].detach())
    ours, theirs = gradient(policy, found), gradient(policy, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
