"""The stack of blocks is found in every architecture, and a tail computes what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from midtune.errors import InputError
from midtune.model.blocks import TailCache, find_blocks, logits_of, returned_by
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


def test_another_structure_is_refused() -> None:
    # It keeps its blocks in an encoder, where a decoder has none.
    with pytest.raises(InputError, match="has no stack of decoder blocks .* use a decoder-only model"):
        find_blocks(tiny_model("bert", is_decoder=True))


def test_blocks_of_two_kinds_are_one_stack() -> None:
    model = tiny_model("jamba", attn_layer_period=2, attn_layer_offset=1)
    name, blocks = find_blocks(model)
    assert name == "model.layers"
    assert len({type(block) for block in blocks}) == 2


@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tail_gives_what_the_whole_model_gives(load: Load, architecture: str, block: int) -> None:
    policy = load(architecture, "none")
    states = plain_states(policy)
    with torch.no_grad():
        found = policy.tail(block, states[block])(
            input_ids=TOKENS, attention_mask=MASK, position_ids=POSITIONS, use_cache=False
        )
    torch.testing.assert_close(found.last_hidden_state, states[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tail_goes_on_from_its_cache(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    states = plain_states(policy)
    cache = TailCache(2)
    parts = []
    for start, stop in ((0, 8), (8, 12)):
        with torch.no_grad():
            found = policy.tail(2, states[2][:, start:stop])(
                input_ids=TOKENS[:, start:stop],
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
    policy.tail(2, states[2])
    assert policy.model.config.to_dict() == config
    assert list(policy.model.model.layers) == blocks
    assert torch.equal(plain_states(policy)[-1], states[-1])


def test_a_tail_shares_the_models_parameters(load: Load) -> None:
    policy = load(quantize="none")
    own = {id(parameter) for parameter in policy.model.parameters()}
    assert {id(parameter) for parameter in policy.tail(2, None).parameters()} <= own


def test_a_block_that_returns_a_tuple_is_skipped_too() -> None:
    model = tiny_model("rwkv")
    _, blocks = find_blocks(model)
    assert returned_by(model, blocks[0]) == 3
    model = tiny_model("qwen3")
    assert returned_by(model, model.model.layers[0]) == 0


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("granite", {"logits_scaling": 4.0}),
        ("gemma3_text", {"final_logit_softcapping": 1.5}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    ],
)
def test_logits_are_the_models_own(architecture: str, settings: dict[str, Any]) -> None:
    model = tiny_model(architecture, **settings)
    with torch.no_grad():
        whole = model(input_ids=TOKENS, use_cache=False, output_hidden_states=True)
        for row in range(len(TOKENS)):
            found = logits_of(model, find_blocks(model)[0], whole.hidden_states[-1][row])
            torch.testing.assert_close(found, whole.logits[row])
