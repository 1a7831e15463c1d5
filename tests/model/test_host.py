"""The input embedding on the host, with the meta device as a card that the table must not reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from midtune.errors import InputError
from midtune.model.host import embed_on_host, is_here, lookups, move_out
from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.rl.tail import completion_log_probs
from midtune.rollout.sampling import Sampling
from midtune.rollout.text import sample
from tests.architectures import DENSE
from tests.plain import PROMPTS, plain_log_probs

Load = Callable[..., Policy]
CARD = torch.device("meta")


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_what_is_sampled_and_learned_from_stays_the_same(load: Load, architecture: str) -> None:
    policy = load(architecture, tie_word_embeddings=False)
    sampling = Sampling(max_new_tokens=6, temperature=1.0, group_size=2)
    torch.manual_seed(3)
    expected = sample(policy, PROMPTS, sampling)
    move_out(policy.model.get_input_embeddings(), policy.device)
    torch.manual_seed(3)
    found = sample(policy, PROMPTS, sampling, boundary_block=2)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    policy.thaw(2)
    log_probs, _ = completion_log_probs(policy, found, temperature=1.0)
    plain, _ = plain_log_probs(policy, found, 1.0)
    torch.testing.assert_close(log_probs[:, : plain.size(1)], plain, atol=1e-3, rtol=1e-3)


def test_embeddings_of_each_block_leave_too_but_not_the_head(load: Load) -> None:
    settings = {**DENSE["gemma4_text"], "hidden_size_per_layer_input": 32, "tie_word_embeddings": True}
    policy = load("gemma4_text", "none", **settings)
    per_block = policy.model.model.embed_tokens_per_layer
    assert lookups(policy.model) == [per_block]
    torch.manual_seed(3)
    expected = sample(policy, PROMPTS, Sampling(max_new_tokens=4))
    move_out(per_block, policy.device)
    assert not is_here(policy.model)
    torch.manual_seed(3)
    assert torch.equal(
        sample(policy, PROMPTS, Sampling(max_new_tokens=4)).completion_ids, expected.completion_ids
    )


def test_the_table_stays_and_its_rows_travel(load: Load) -> None:
    policy = load("gemma3_text", "none", tie_word_embeddings=False)
    embedding = policy.model.get_input_embeddings()
    table = embedding.weight.clone()
    move_out(embedding, CARD)
    policy.model.to(CARD)
    assert policy.device == CARD
    assert torch.equal(embedding.weight, table)
    assert embedding(torch.tensor([[3, 4]])).device == CARD
    assert not any(parameter.numel() == table.numel() for parameter in embedding.parameters())
    # A second time there is nothing left to move.
    embed_on_host(policy.model, "it")
    assert len(embedding._forward_hooks) == 1


def test_a_head_that_is_the_embedding_keeps_it_on_the_card(load: Load) -> None:
    policy = load("qwen3", "none")
    policy.model.to(CARD).tie_weights()
    with pytest.raises(InputError, match="as its output head too, .* leave out model.embeddings=host"):
        embed_on_host(policy.model, "it")
    assert policy.model.get_input_embeddings()._parameters


def test_full_training_wants_it_where_the_model_is(load: Load) -> None:
    policy = load("llama", "none")
    move_out(policy.model.get_input_embeddings(), policy.device)
    with pytest.raises(InputError, match="leave out model.embeddings=host"):
        policy.thaw_all()


def test_on_a_cpu_there_is_nothing_to_do(load: Load) -> None:
    policy = load("llama", "none")
    embed_on_host(policy.model, "it")
    assert policy.model.get_input_embeddings()._parameters


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_card(random_checkpoint: Callable[..., object]) -> None:
    policy = load_policy(resolve(str(random_checkpoint("llama"))), device="cuda")
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        before = torch.cuda.memory_allocated()
        embed_on_host(policy.model, "it")
        assert torch.cuda.memory_allocated() < before
        torch.testing.assert_close(policy.model(input_ids=ids).logits, expected)
