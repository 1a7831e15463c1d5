"""What a loaded model is made of: 4-bit blocks, everything else as stored, nothing trainable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    Trainer,
    TrainingArguments,
)

from midtune.errors import InputError
from midtune.model.loading import load_policy, load_tokenizer
from midtune.model.policy import Policy
from midtune.model.sources import resolve
from midtune.rollout.sampling import Sampling
from midtune.rollout.speech import prompt_ids
from midtune.rollout.text import sample
from tests.conftest import ARCHITECTURES
from tests.model.toy_training import TOKENS, logits_of

Load = Callable[..., Policy]
Make = Callable[..., Path]


def linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_linear_layers_of_blocks_are_in_double_quantized_nf4(load: Load, architecture: str) -> None:
    for layer in linears(load(architecture).blocks):
        assert isinstance(layer, Linear4bit)
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_norms_and_head_are_as_stored(load: Load, architecture: str) -> None:
    policy = load(architecture)
    stored = AutoModelForCausalLM.from_pretrained(policy.source.folder).state_dict()
    plain = {name: p for name, p in policy.model.named_parameters() if not hasattr(p, "quant_state")}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= plain.keys()
    assert type(policy.model.lm_head) is nn.Linear
    assert all(torch.equal(parameter, stored[name]) for name, parameter in plain.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_quantization_the_model_is_the_plain_one(load: Load, architecture: str) -> None:
    policy = load(architecture, "none")
    assert {type(layer) for layer in linears(policy.model)} == {nn.Linear}
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(policy.source.folder)(input_ids=TOKENS).logits
    assert torch.equal(logits_of(policy), plain)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_nothing_is_trainable(load: Load, quantize: str) -> None:
    policy = load(quantize=quantize)
    assert (policy.trained, policy.trained_parameters()) == ([], {})


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])  # tied and untied
def test_four_bit_parameters_count_as_the_weights_they_stand_for(load: Load, architecture: str) -> None:
    plain = sum(parameter.numel() for parameter in load(architecture, "none").model.parameters())
    assert load(architecture).total_parameters == plain


def test_shards_load_as_the_single_file_does(load: Load) -> None:
    sharded = load(shard_size="200KB")
    assert len(list(sharded.source.folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(sharded), logits_of(load()))


def test_a_half_precision_checkpoint_is_computed_in_single_on_the_cpu(load: Load) -> None:
    policy = load(quantize="none", dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


def test_a_checkpoint_stored_in_4bit_is_taken_as_it_is(load: Load, stored_in_4bit: Path) -> None:
    policy = load(stored_in_4bit)
    assert (policy.stored_quantized, policy.quantized) == (True, True)
    assert torch.equal(logits_of(policy), logits_of(load()))


@pytest.mark.parametrize("stored", [False, True])
def test_the_trainer_of_transformers_accepts_a_thawed_4bit_model(
    load: Load, stored_in_4bit: Path, tmp_path: Path, stored: bool
) -> None:
    policy = load(stored_in_4bit) if stored else load()
    policy.thaw(1)
    Trainer(policy.model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert not hasattr(policy.model.config, "quantization_config")


def test_an_encoder_decoder_is_refused(random_checkpoint: Make, load: Load, tmp_path: Path) -> None:
    config = T5Config(vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(random_checkpoint()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a t5 model, which is an encoder-decoder; use a decoder-only"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "llama"])
def test_a_model_without_a_tokenizer_is_refused(load: Load, tmp_path: Path, architecture: str) -> None:
    load(architecture, "none").model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer.*; put its files \(tokenizer.json"):
        load(tmp_path)


def with_tokenizer(folder: Path, tmp_path: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a checkpoint whose tokenizer is changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    for file in copy.glob("*token*"):
        file.unlink()
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(copy)
    return copy


@pytest.mark.parametrize(
    "template", [None, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"]
)
def test_a_tokenizers_bos_is_put_before_a_prompt_once(
    random_checkpoint: Make, tmp_path: Path, template: str | None
) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        tokenizer.chat_template = template

    tokenizer = load_tokenizer(resolve(str(with_tokenizer(random_checkpoint(), tmp_path, change))))
    text = "Hi\n" if template is None else "Hi"
    expected = [1, *tokenizer.encode(text, add_special_tokens=False)]
    assert prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}]) == expected
    assert prompt_ids(tokenizer, text) == expected


def test_a_tokenizer_that_adds_no_bos_gets_none(random_checkpoint: Make, tmp_path: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = None

    tokenizer = load_tokenizer(resolve(str(with_tokenizer(random_checkpoint(), tmp_path, change))))
    assert prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}]) == prompt_ids(tokenizer, "Hi\n")
    assert tokenizer.bos_token_id not in prompt_ids(tokenizer, "Hi\n")


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    random_checkpoint: Make, load: Load, tmp_path: Path
) -> None:
    folder = with_tokenizer(
        random_checkpoint(), tmp_path, lambda t: t.add_tokens([f"<x{n}>" for n in range(40)])
    )
    with pytest.raises(
        InputError, match=r"tokens \('<x\d+>', .*, …\) beyond the \d+ that its embedding .*resize_tok"
    ):
        load(folder)


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null", '{"model": 3}'])
def test_a_damaged_tokenizer_is_one_sentence(random_checkpoint: Make, tmp_path: Path, damaged: str) -> None:
    folder = with_tokenizer(random_checkpoint(), tmp_path, lambda tokenizer: None)
    (folder / "tokenizer.json").write_text(damaged)
    with pytest.raises(InputError, match=r"has no tokenizer .*; put its files"):
        load_tokenizer(resolve(str(folder)))


def test_a_tokenizer_without_padding_and_end_is_refused(random_checkpoint: Make, tmp_path: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token = None

    folder = with_tokenizer(random_checkpoint(), tmp_path, change)
    with pytest.raises(InputError, match="neither a padding token nor one that ends a text"):
        load_tokenizer(resolve(str(folder)))


def test_the_tokenizer_pads_on_the_left(load: Load) -> None:
    assert load().tokenizer.padding_side == "left"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_computes_in_half_precision_over_fp32_masters(random_checkpoint: Make) -> None:
    policy = load_policy(resolve(str(random_checkpoint())), device="cuda")
    policy.thaw(1)
    with policy.autocast():
        policy.model(input_ids=TOKENS.to("cuda")).logits.float().sum().backward()
    trained: dict[str, Any] = policy.trained_parameters()
    assert policy.model.lm_head.weight.dtype == policy.compute_dtype
    assert {(p.dtype, p.grad.dtype) for p in trained.values()} == {(torch.float32, torch.float32)}


def test_a_model_that_overflows_fp16_computes_in_fp32_where_there_is_no_bf16(
    random_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, **settings: Any) -> tuple[Policy, list[str]]:
        said: list[str] = []
        found = load_policy(resolve(str(folder)), device="cpu", on_message=said.append, **settings)
        return found, said

    usual = random_checkpoint("gemma3_text")
    large = tmp_path / "large"
    shutil.copytree(usual, large)
    tensors = load_file(large / "model.safetensors")
    for name, tensor in tensors.items():
        # Each adds as much to the residual stream, whose sum is beyond 65,504.
        if name.endswith("post_feedforward_layernorm.weight"):
            tensor.fill_(3e4)
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("midtune.model.loading.compute_dtype_of", lambda device: torch.float16)
    policy, said = load(usual)
    assert (policy.compute_dtype, said) == (torch.float16, [])
    policy, said = load(large)
    assert said == [f"{large} overflows fp16, so it computes in fp32, in more memory."]
    assert policy.compute_dtype == torch.float32
    rollout = sample(policy, [[5, 6, 7]], Sampling(8, group_size=4))
    assert rollout.log_probs.isfinite().all()
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32, torch.uint8}
