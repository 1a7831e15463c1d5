"""Mixtures of experts and models that also see: exact in memory, and written back under the checkpoint's own names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from midtune.errors import InputError
from midtune.model.loading import load_policy
from midtune.model.patch import apply_patch, deployed_tensors, merge_patch, save_patch
from midtune.model.policy import Policy
from midtune.model.quantize import dequantized, expert_modules, plain_name
from midtune.model.sources import Source, resolve
from tests.architectures import EVERY as ARCHITECTURES
from tests.architectures import EXPERTS
from tests.conftest import COMMON
from tests.model.toy_training import TOKENS, logits_of, perturb

Make = Callable[[str], Path]
Settings = dict[str, Any]

MIXTURES = (
    "qwen3_moe qwen2_moe mixtral glm4_moe deepseek_v2 deepseek_v3 granitemoe dots1 minimax_m2 gpt_oss".split()
)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
TOWER: Settings = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: Settings = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
QWEN: Settings = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252}
# A model's settings, those of its text part, and those of its vision tower.
SEEING: dict[str, tuple[Settings, Settings, Settings]] = {
    "gemma3": (
        {"mm_tokens_per_image": 4, "image_token_index": 250},
        {"head_dim": 16, "sliding_window": 6},
        TOWER,
    ),
    "gemma4": (
        {"audio_config": None},
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 6,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 260,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16},
    ),
    "qwen2_5_vl": (QWEN, SECTIONS, QWEN_TOWER),
    "qwen3_vl": (QWEN, SECTIONS, QWEN_TOWER),
    "qwen3_vl_moe": (QWEN, {**EXPERTS, **SECTIONS}, QWEN_TOWER),
    "qwen3_5": (
        QWEN,
        {
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
        },
        QWEN_TOWER,
    ),
    "mistral3": ({"image_token_index": 250}, {"model_type": "mistral"}, {**TOWER, "model_type": "pixtral"}),
    "llava": (
        {"image_token_index": 250},
        {"model_type": "llama"},
        {**TOWER, "model_type": "clip_vision_model"},
    ),
    "smolvlm": ({"image_token_id": 250, "scale_factor": 2}, {"model_type": "llama"}, TOWER),
}
# One of each way of conversion is tried in the fast suite.
EVERY = [*MIXTURES, *SEEING]
FAST = ["mixtral", "deepseek_v3", "gemma3", "qwen2_5_vl", "qwen3_vl_moe", "llava"]
ROWS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in EVERY]


@pytest.fixture(scope="session")
def made(random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function: architecture → folder as save_pretrained writes it, with a tokenizer (made once)."""
    known: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            if name in MIXTURES:
                config = AutoConfig.for_model(name, **{**COMMON, **ARCHITECTURES[name]})
            else:
                whole, text, tower = SEEING[name]
                config = AutoConfig.for_model(
                    name, text_config={**COMMON, **text}, vision_config=tower, **whole
                )
            torch.manual_seed(0)
            known[name] = tmp_path_factory.mktemp(name)
            auto_class(name).from_config(config).save_pretrained(known[name])
            for file in random_checkpoint().glob("*token*"):
                shutil.copy(file, known[name])
        return known[name]

    return make


def auto_class(name: str) -> Any:
    return AutoModelForCausalLM if name in MIXTURES else AutoModelForImageTextToText


def plain(name: str, folder: Path) -> PreTrainedModel:
    return auto_class(name).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def trained(policy: Policy) -> set[str]:
    return {plain_name(name) for name in policy.trained_parameters()}


def inside(model: PreTrainedModel, prefix: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize("name", ROWS)
def test_it_computes_trains_and_merges_exactly(made: Make, name: str, tmp_path: Path) -> None:
    source = resolve(str(made(name)))
    right = plain(name, source.folder)

    policy = load_policy(source, quantize="none", device="cpu")
    block = f"{policy.stack_name}.2."
    assert torch.allclose(logits_of(policy), logits(right), atol=1e-5)
    assert not any("vision" in part or "visual" in part for part, _ in policy.model.named_modules())

    # In 4-bit it computes what the plain model does with the dequantized weights.
    packed = load_policy(source, device="cpu")
    assert packed.total_parameters == policy.total_parameters
    experts = expert_modules(packed.model)
    assert bool(experts) == ("experts" in str(inside(right, block)))
    held = dict(packed.model.named_parameters())
    with torch.no_grad():
        for place, part in packed.model.named_modules():
            if isinstance(part, Linear4bit):
                right.get_parameter(f"{place}.weight").copy_(dequantized(part.weight))
        for place, part in experts.items():
            for key in part.parametrizations:
                assert held[f"{place}.parametrizations.{key}.original"].dtype == torch.uint8
                right.get_parameter(f"{place}.{key}").copy_(getattr(part, key))
    assert torch.allclose(logits_of(packed), logits(right), atol=1e-4)

    # Masters are the checkpoint's, and a gradient reaches all of them and nothing else.
    packed.thaw(2)
    assert trained(packed) == inside(right, block)
    originals = plain(name, source.folder)
    for key, value in packed.trained_parameters().items():
        assert torch.equal(value, originals.get_parameter(plain_name(key)))
    packed.model(input_ids=TOKENS).logits.square().mean().backward()
    reached = {plain_name(key) for key, value in packed.model.named_parameters() if value.grad is not None}
    assert reached == trained(packed)

    # The patch and what is merged differ from the checkpoint in that block alone, under its names.
    perturb(packed)
    save_patch(packed, tmp_path / "patch")
    tensors = deployed_tensors(source, tmp_path / "patch")
    merge_patch(source, tensors, tmp_path / "merged")
    stored, merged = (
        load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "merged")
    )
    assert stored.keys() == merged.keys()
    changed = {key for key in stored if not torch.equal(stored[key], merged[key])}
    assert changed == tensors.keys() and all(torch.equal(merged[key], tensors[key]) for key in tensors)

    # The merged folder is a model of the same class, equal to the patched policy, also when it generates.
    whole = plain(name, tmp_path / "merged")
    assert type(whole) is type(originals)
    apply_patch(policy, tmp_path / "patch")
    assert torch.allclose(logits_of(policy), logits(whole), atol=1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(policy.model.generate(TOKENS, **settings), whole.generate(TOKENS, **settings))


def test_experts_may_stay_frozen(made: Make, tmp_path: Path) -> None:
    source = resolve(str(made("qwen3_moe")))
    policy = load_policy(source, experts="frozen", device="cpu")
    policy.thaw(1)
    block = {f"model.layers.1.{key}" for key in ("mlp.gate.weight", "self_attn.q_proj.weight")}
    assert block < trained(policy) and not any("experts" in key for key in trained(policy))
    perturb(policy)
    save_patch(policy, tmp_path / "patch")
    tensors = deployed_tensors(source, tmp_path / "patch")
    assert not any("experts" in key for key in tensors)
    # A patch says by itself what it holds.
    again = load_policy(source, device="cpu")
    apply_patch(again, tmp_path / "patch")
    assert torch.equal(logits_of(again), logits_of(policy))


@pytest.fixture
def in_mxfp4(made: Make, tmp_path: Path) -> Source:
    """gpt-oss with random experts in MXFP4, as it is published."""
    folder = tmp_path / "gpt_oss"
    shutil.copytree(made("gpt_oss"), folder)
    source, stored = torch.Generator().manual_seed(0), {}
    for key, value in load_file(folder / "model.safetensors").items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = value.bfloat16()
            continue
        experts, inputs, outputs = value.shape
        groups = (experts, outputs, inputs // 32)
        stored[f"{key}_blocks"] = torch.randint(256, (*groups, 16), generator=source).byte()
        stored[f"{key}_scales"] = torch.randint(122, 125, groups, generator=source).byte()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    (folder / "config.json").write_text(json.dumps(config))
    return resolve(str(folder))


def test_experts_in_mxfp4_are_held_and_merged_as_they_are_stored(in_mxfp4: Source, tmp_path: Path) -> None:
    policy = load_policy(in_mxfp4, quantize="none", device="cpu")
    # Four experts of 256 gates and ups: 17 bytes hold 32 of the 64 values of a row.
    assert policy.blocks[0].mlp.experts.parametrizations.gate_up_proj.original.shape == (4, 256, 2, 17)
    whole = AutoModelForCausalLM.from_pretrained(in_mxfp4.folder, dtype=torch.float32).eval()
    assert torch.equal(logits_of(policy), logits(whole))
    policy.thaw(2)
    policy.model(input_ids=TOKENS).logits.square().mean().backward()
    assert all(value.grad is not None for value in policy.trained_parameters().values())
    perturb(policy)
    save_patch(policy, tmp_path / "patch")
    merge_patch(in_mxfp4, deployed_tensors(in_mxfp4, tmp_path / "patch"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    again = load_policy(in_mxfp4, quantize="none", device="cpu")
    apply_patch(again, tmp_path / "patch")
    assert torch.equal(logits_of(again), logits(merged))


def test_training_experts_in_mxfp4_is_refused(in_mxfp4: Source) -> None:
    with pytest.raises(InputError, match="stored in MXFP4, which cannot hold what training makes"):
        load_policy(in_mxfp4, experts="all", device="cpu")


def test_a_checkpoint_without_a_blocks_tensor_is_refused(made: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made("mixtral"), folder)
    stored = load_file(folder / "model.safetensors")
    stored["other"] = stored.pop("model.layers.1.block_sparse_moe.experts.0.w1.weight")
    policy = load_policy(resolve(str(made("mixtral"))), device="cpu")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    policy.source = resolve(str(folder))
    with pytest.raises(InputError, match="has no tensor model.layers.1.block_sparse_moe.experts.0.w1.weight"):
        policy.thaw(1)
