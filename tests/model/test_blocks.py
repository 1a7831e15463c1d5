"""The stack of blocks is found in every architecture, and a tail computes what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from midtune.errors import InputError
from midtune.model.blocks import TailCache, check_tail, find_blocks
from midtune.model.policy import Policy
from tests.conftest import ARCHITECTURES, COMMON
from tests.model.toy_training import TOKENS

Load = Callable[..., Policy]

# The first row begins with padding, and both are longer than the sliding windows.
MASK = torch.ones_like(TOKENS).index_put_((torch.tensor(0), torch.arange(3)), torch.tensor(0))
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def plain_states(policy: Policy) -> list[torch.Tensor]:
    """What enters each block of the plain model and, last, what leaves the final norm."""
    return list(
        policy.model.get_decoder()(
            input_ids=TOKENS,
            attention_mask=MASK,
            position_ids=POSITIONS,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
    )


def tiny_model(architecture: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **{**COMMON, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stack_is_found(load: Load, architecture: str) -> None:
    model = load(architecture, "none").model
    assert find_blocks(model) == ("model.layers", model.model.layers)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gpt2", {}),  # has no nn.Linear
        ("bert", {"is_decoder": True}),  # keeps its blocks in an encoder that takes no embeddings
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),  # has blocks of two kinds
    ],
)
def test_another_structure_is_refused(architecture: str, settings: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match="has no stack of 4 equal decoder blocks .* use a decoder-only model"
    ):
        find_blocks(tiny_model(architecture, **settings))


@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tail_gives_what_the_whole_model_gives(load: Load, architecture: str, block: int) -> None:
    policy = load(architecture, "none")
    states = plain_states(policy)
    with torch.no_grad():
        found = policy.tail(block)(
            inputs_embeds=states[block], attention_mask=MASK, position_ids=POSITIONS, use_cache=False
        )
    torch.testing.assert_close(found.last_hidden_state, states[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tail_goes_on_from_its_cache(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    states = plain_states(policy)
    tail, cache = policy.tail(2), TailCache(2)
    parts = []
    for start, stop in ((0, 8), (8, 12)):
        with torch.no_grad():
            found = tail(
                inputs_embeds=states[2][:, start:stop],
                attention_mask=MASK[:, :stop],
                position_ids=POSITIONS[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
        parts.append(found.last_hidden_state)
        written = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        cache = TailCache(2, written, torch.arange(len(MASK)))
    real = MASK.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], states[-1][real])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tail_leaves_the_model_as_it_is(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    config, blocks, states = policy.model.config.to_dict(), list(policy.blocks), plain_states(policy)
    policy.tail(2)
    assert policy.model.config.to_dict() == config
    assert list(policy.model.model.layers) == blocks
    assert torch.equal(plain_states(policy)[-1], states[-1])


def test_a_tail_shares_the_models_parameters(load: Load) -> None:
    policy = load(quantize="none")
    own = {id(parameter) for parameter in policy.model.parameters()}
    assert {id(parameter) for parameter in policy.tail(2).parameters()} <= own


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),  # adds positions
        ("bloom", {}),  # normalizes embeddings
        ("granite", {"embedding_multiplier": 3.0}),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}),  # looks token ids up in every block
    ],
)
def test_a_model_that_cannot_start_in_the_middle_is_refused(
    architecture: str, settings: dict[str, Any]
) -> None:
    model = tiny_model(architecture, **settings)
    with pytest.raises(InputError, match="cannot be run from a block in the middle"):
        check_tail(model, find_blocks(model)[0])


def test_such_a_model_is_not_loaded(random_checkpoint: Callable[..., Path], load: Load) -> None:
    folder = random_checkpoint("granite", embedding_multiplier=3.0)
    with pytest.raises(InputError, match="GraniteForCausalLM cannot be run from a block in the middle"):
        load(folder)
