"""Blocks thawed, frozen again, given LoRA and compared with their reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.model.quantize import dequantized
from tests.architectures import RECURRENT
from tests.conftest import ARCHITECTURES
from tests.model.toy_training import logits_of, perturb

Load = Callable[..., Policy]


def tensors_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Everything the model holds, packed 4-bit data and its quantization state included."""
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def qwen3_block_parameters(policy: Policy) -> int:
    config = policy.model.config
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = hidden * queries + 2 * hidden * keys + queries * hidden
    mlp = 3 * hidden * config.intermediate_size
    norms = 2 * head + 2 * hidden
    return attention + mlp + norms


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masters_are_the_checkpoints_tensors_in_fp32(load: Load, architecture: str, stored: str) -> None:
    policy = load(architecture, dtype=stored)
    policy.thaw(2)
    checkpoint = load_file(policy.source.folder / "model.safetensors")
    for name, master in policy.trained_parameters().items():
        assert master.dtype == torch.float32
        assert torch.equal(master, checkpoint[name].float())


def test_a_thawed_block_is_no_longer_in_4bit(load: Load) -> None:
    policy = load()
    policy.thaw(2)
    kinds = [{type(part) for part in block.modules()} for block in policy.blocks]
    assert [(Linear4bit in kind, nn.Linear in kind) for kind in kinds] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
    ]


def test_nothing_but_the_thawed_block_is_trained(load: Load) -> None:
    policy = load()
    policy.thaw(2)
    inside = {f"model.layers.2.{name}" for name, _ in policy.blocks[2].named_parameters()}
    assert policy.trained_parameters().keys() == inside


@pytest.mark.parametrize("blocks", [[1], [3, 0]])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_trained_parameters_are_exactly_the_blocks(load: Load, quantize: str, blocks: list[int]) -> None:
    policy = load(quantize=quantize)
    for block in blocks:
        policy.thaw(block)
    count = sum(parameter.numel() for parameter in policy.trained_parameters().values())
    assert count == len(blocks) * qwen3_block_parameters(policy)
    assert policy.trained == sorted(blocks)


def test_thawing_all_blocks_of_an_unquantized_model_changes_no_logit(load: Load) -> None:
    policy = load(quantize="none")
    before = logits_of(policy)
    for block in range(policy.num_blocks):
        policy.thaw(block)
    assert torch.equal(logits_of(policy), before)


def test_thawing_twice_keeps_what_was_trained(load: Load) -> None:
    policy = load()
    policy.thaw(1)
    perturb(policy)
    before = tensors_of(policy)
    policy.thaw(1)
    assert differing(before, tensors_of(policy)) == []


def test_training_a_block_leaves_all_others_as_they_are(load: Load) -> None:
    policy = load()
    policy.thaw(1)
    before, trained = tensors_of(policy), list(policy.trained_parameters())
    perturb(policy)
    assert differing(before, tensors_of(policy)) == trained


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_freezing_puts_the_4bit_block_back_bit_for_bit(load: Load, architecture: str) -> None:
    policy = load(architecture)
    block, before, logits = policy.blocks[1], tensors_of(policy), logits_of(policy)
    policy.thaw(1)
    perturb(policy)
    policy.restore()
    assert policy.blocks[1] is block
    assert differing(before, tensors_of(policy)) == []
    assert torch.equal(logits_of(policy), logits)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_model_whose_blocks_were_all_thawed_in_turn_is_unchanged(load: Load, quantize: str) -> None:
    policy = load(quantize=quantize)
    before = tensors_of(policy)
    for block in range(policy.num_blocks):
        policy.thaw(block)
        perturb(policy)
        policy.restore()
    assert differing(before, tensors_of(policy)) == []
    assert policy.trained_parameters() == {}


def test_gradients_pass_through_the_4bit_blocks_above(load: Load) -> None:
    policy = load()
    policy.thaw(0)
    policy.model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.trained_parameters().values())


def test_masters_of_a_4bit_checkpoint_are_its_dequantized_weights(load: Load, stored_in_4bit: Path) -> None:
    policy = load(stored_in_4bit)
    stored = {
        f"model.layers.1.{name}.weight": dequantized(part.weight)
        for name, part in policy.blocks[1].named_modules()
        if isinstance(part, Linear4bit)
    }
    policy.thaw(1)
    masters = policy.trained_parameters()
    assert len(stored) == 7
    assert all(torch.equal(masters[name], weight.float()) for name, weight in stored.items())


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_does_not_exist_is_refused(load: Load, block: int) -> None:
    policy = load()
    for ask in (policy.thaw, lambda wanted: policy.add_lora([wanted], rank=2)):
        with pytest.raises(InputError, match=f"block {block} was asked for, .* 4 blocks, numbered 0 to 3"):
            ask(block)


# --- LoRA


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_lora_trains_matrices_on_every_linear_layer_of_its_blocks(load: Load, quantize: str) -> None:
    policy = load(quantize=quantize)
    sizes = {
        f"model.layers.{block}.{name}.lora_{letter}.default.weight": shape
        for block in (1, 3)
        for name, part in policy.blocks[block].named_modules()
        if isinstance(part, nn.Linear)
        for letter, shape in (("A", (2, part.in_features)), ("B", (part.out_features, 2)))
    }
    policy.add_lora([3, 1], rank=2)
    trained = policy.trained_parameters()
    assert {name: tuple(parameter.shape) for name, parameter in trained.items()} == sizes
    assert policy.trained == [1, 3]


def test_lora_matrices_are_in_fp32(load: Load) -> None:
    policy = load()
    policy.model.to(torch.bfloat16)
    policy.add_lora([1], rank=2)
    assert {parameter.dtype for parameter in policy.trained_parameters().values()} == {torch.float32}


def test_lora_begins_at_the_base_model(load: Load) -> None:
    policy = load()
    before = logits_of(policy)
    policy.add_lora([1], rank=2)
    assert torch.equal(logits_of(policy), before)


# --- the reference


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_reference_computes_what_the_policy_did(load: Load, quantize: str) -> None:
    policy = load(quantize=quantize)
    policy.thaw(1)
    policy.thaw(2)
    policy.keep_reference()
    before = logits_of(policy)
    perturb(policy)
    with policy.reference():
        assert torch.equal(logits_of(policy), before)


def test_the_reference_of_lora_is_the_base_model(load: Load) -> None:
    policy = load()
    before = logits_of(policy)
    policy.add_lora([1], rank=2)
    policy.keep_reference()
    perturb(policy)
    with policy.reference():
        assert torch.equal(logits_of(policy), before)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_policy_is_back_after_its_reference(load: Load, adapter: str) -> None:
    policy = load()
    if adapter == "lora":
        policy.add_lora([1], rank=2)
    else:
        policy.thaw(1)
    policy.keep_reference()
    perturb(policy)
    trained, logits = list(policy.trained_parameters()), logits_of(policy)
    with pytest.raises(RuntimeError), policy.reference():
        raise RuntimeError
    assert list(policy.trained_parameters()) == trained
    assert torch.equal(logits_of(policy), logits)


def test_the_reference_is_not_trained(load: Load) -> None:
    policy = load()
    policy.thaw(1)
    policy.keep_reference()
    with policy.reference():
        assert policy.trained_parameters() == {}


def test_everything_thawed_comes_back_bit_for_bit(load: Load) -> None:
    policy = load("qwen3", "none", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    logits = policy.model(ids).logits.detach()
    policy.thaw_all()
    assert policy.whole and policy.trained == [0, 1, 2, 3]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.model.parameters())
    assert sum(p.numel() for p in policy.trained_parameters().values()) == policy.total_parameters
    policy.keep_reference()
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.1
    with policy.reference():
        assert torch.equal(policy.model(ids).logits, logits)
    assert not torch.equal(policy.model(ids).logits, logits)
    policy.restore()
    assert not policy.whole and not policy.trained and not policy.trained_parameters()
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight


def test_a_model_in_4_bit_is_not_trained_whole(load: Load) -> None:
    with pytest.raises(InputError, match="4-bit.*--quantize none"):
        load("qwen3").thaw_all()


def test_the_kind_of_a_block_is_said_where_blocks_differ(load: Load) -> None:
    assert load("qwen3").kinds([1]) == ""
    mixed = load("lfm2", **RECURRENT["lfm2"])
    assert mixed.kinds([2]) == " (conv)"
    assert mixed.kinds([2, 3]) == " (conv, full attention)"


def test_a_block_that_shares_its_parameters_is_not_trained_alone(load: Load) -> None:
    policy = load("zamba", "none", **RECURRENT["zamba"])
    with pytest.raises(InputError, match="block 3 was asked for, but .* it shares parameters with block 1"):
        policy.thaw(3)
