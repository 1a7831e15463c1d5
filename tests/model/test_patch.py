"""Patches: saved under the checkpoint's names, applied again, merged; refused whole or written whole."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from midtune.errors import InputError
from midtune.model.patch import (
    apply_patch,
    deployed_tensors,
    merge_patch,
    read_patch,
    save_patch,
)
from midtune.model.policy import Policy
from midtune.model.sources import checkpoint_files
from midtune.rollout.sampling import Sampling
from midtune.rollout.text import sample
from tests.model.toy_training import TOKENS, logits_of, perturb

Load = Callable[..., Policy]

CHECKPOINTS = pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param({"architecture": "qwen3"}, id="tied"),
        pytest.param({"architecture": "llama"}, id="untied"),
        pytest.param({"architecture": "phi3"}, id="fused"),
        pytest.param({"shard_size": "200KB"}, id="sharded"),
        pytest.param({"dtype": "bfloat16"}, id="bf16"),
    ],
)


@pytest.fixture
def patch(load: Load, tmp_path: Path) -> Path:
    """Blocks 1 and 2 of the Qwen3 checkpoint, trained over 4-bit."""
    save_patch(trained(load()), tmp_path / "patch")
    return tmp_path / "patch"


def trained(policy: Policy) -> Policy:
    for block in (1, 2):
        policy.thaw(block)
    perturb(policy)
    return policy


def trained_lora(policy: Policy) -> Policy:
    policy.add_lora([1, 2], rank=2)
    perturb(policy)
    return policy


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in set(checkpoint_files(folder).values())
        for name, tensor in load_file(shard).items()
    }


# --- saving


@CHECKPOINTS
def test_a_patch_has_the_checkpoints_names_and_dtypes(
    load: Load, tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    policy = trained(load(**checkpoint))
    save_patch(policy, tmp_path / "patch")
    base = tensors_in(policy.source.folder)
    inside = {name for name in base if name.startswith(("model.layers.1.", "model.layers.2."))}
    found = load_file(tmp_path / "patch" / "patch.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {name: base[name].dtype for name in inside}


def test_a_patch_holds_what_was_trained(load: Load, tmp_path: Path) -> None:
    policy = trained(load())
    save_patch(policy, tmp_path / "patch")
    found = load_file(tmp_path / "patch" / "patch.safetensors")
    assert all(torch.equal(p, found[name]) for name, p in policy.trained_parameters().items())


def test_a_patch_says_what_it_belongs_to(load: Load, patch: Path) -> None:
    found = read_patch(patch)
    assert (found.base_model, found.revision) == (str(load().source.folder), None)
    assert (found.blocks, found.adapter) == ([1, 2], "full")


def test_the_bytes_written_are_those_of_the_folder(load: Load, tmp_path: Path) -> None:
    written = save_patch(trained(load()), tmp_path / "patch")
    assert written == sum(file.stat().st_size for file in (tmp_path / "patch").iterdir())


def test_saving_again_replaces_the_patch(load: Load, patch: Path) -> None:
    policy = load()
    policy.thaw(3)
    save_patch(policy, patch)
    assert read_patch(patch).blocks == [3]
    assert all(name.startswith("model.layers.3.") for name in load_file(patch / "patch.safetensors"))


def test_a_patch_that_cannot_be_written_leaves_the_old_one(load: Load, patch: Path) -> None:
    before = {file.name: file.read_bytes() for file in patch.iterdir()}
    with files_up_to(100_000), pytest.raises(SafetensorError, match="File too large"):
        save_patch(trained(load()), patch)
    assert {file.name: file.read_bytes() for file in patch.iterdir()} == before
    assert list(patch.parent.iterdir()) == [patch]


@contextmanager
def files_up_to(most_bytes: int) -> Iterator[None]:
    """The system refuses to write larger files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- applying


def test_an_applied_patch_computes_what_was_trained(load: Load, patch: Path) -> None:
    fresh = load()
    apply_patch(fresh, patch)
    assert torch.equal(logits_of(fresh), logits_of(trained(load())))


def test_a_patch_of_a_4bit_checkpoint_is_applied_to_it(
    load: Load, stored_in_4bit: Path, tmp_path: Path
) -> None:
    policy, fresh = trained(load(stored_in_4bit)), load(stored_in_4bit)
    save_patch(policy, tmp_path / "patch")
    apply_patch(fresh, tmp_path / "patch")
    assert torch.equal(logits_of(fresh), logits_of(policy))


@pytest.mark.parametrize("train", [trained, trained_lora])
def test_other_base_weights_are_refused(
    load: Load, tmp_path: Path, train: Callable[[Policy], Policy]
) -> None:
    save_patch(train(load()), tmp_path / "patch")
    with pytest.raises(InputError, match="was trained on other weights .* use the base model and revision"):
        apply_patch(load(initializer_range=0.1), tmp_path / "patch")


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("train", [trained, trained_lora])
def test_a_removed_patch_leaves_the_base_bit_for_bit(
    load: Load, tmp_path: Path, train: Callable[[Policy], Policy], quantize: str
) -> None:
    save_patch(train(load(quantize=quantize)), tmp_path / "patch")
    policy = load(quantize=quantize)
    modules, logits = list(policy.model.modules()), logits_of(policy)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    for _ in range(2):
        apply_patch(policy, tmp_path / "patch")
        applied = logits_of(policy)
        assert not torch.equal(applied, logits)
        policy.restore()
        after = policy.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert all(new is old for new, old in zip(policy.model.modules(), modules, strict=True))
        assert (policy.trained, policy.trained_parameters()) == ([], {})
        assert torch.equal(logits_of(policy), logits)
    apply_patch(policy, tmp_path / "patch")
    assert torch.equal(logits_of(policy), applied)


def test_no_patch_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no trained patch"):
        read_patch(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"blocks": [1]}'])
def test_a_damaged_description_is_named(patch: Path, content: str) -> None:
    (patch / "patch.json").write_text(content)
    with pytest.raises(InputError, match="patch.json is damaged; train again or restore the file"):
        read_patch(patch)


def test_missing_tensors_are_named(patch: Path) -> None:
    (patch / "patch.safetensors").unlink()
    with pytest.raises(InputError, match="lacks patch.safetensors; train again or restore the file"):
        read_patch(patch)


@pytest.mark.parametrize("damage", ["cut short", "renamed"])
def test_damaged_tensors_are_named(patch: Path, load: Load, damage: str) -> None:
    file = patch / "patch.safetensors"
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"patch is damaged \(patch\.safetensors (has|does not have)"):
        apply_patch(load(), patch)
    # Patches of earlier versions have no manifest.
    (patch / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"patch\.safetensors is damaged"):
        apply_patch(load(), patch)


def test_a_patch_with_one_bit_flipped_is_refused_and_one_without_a_manifest_is_not(patch: Path) -> None:
    tensors = patch / "patch.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    whole = tensors.read_bytes()
    tensors.write_bytes(content)
    with pytest.raises(InputError, match="patch.safetensors does not have its checksum"):
        read_patch(patch)
    tensors.write_bytes(whole)
    (patch / "manifest.json").unlink()
    assert read_patch(patch).blocks == [1, 2]


def test_a_missing_adapter_is_named(load: Load, tmp_path: Path) -> None:
    save_patch(trained_lora(load()), tmp_path / "patch")
    (tmp_path / "patch" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="lacks adapter_model.safetensors"):
        read_patch(tmp_path / "patch")


# --- LoRA


def test_a_lora_patch_is_an_adapter_that_peft_loads(load: Load, tmp_path: Path) -> None:
    policy = trained_lora(load(quantize="none"))
    save_patch(policy, tmp_path / "patch")
    base = AutoModelForCausalLM.from_pretrained(policy.source.folder)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "patch").eval()(input_ids=TOKENS).logits
    assert torch.equal(found, logits_of(policy))


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_an_applied_lora_patch_computes_what_was_trained(load: Load, tmp_path: Path, quantize: str) -> None:
    policy, fresh = trained_lora(load(quantize=quantize)), load(quantize=quantize)
    save_patch(policy, tmp_path / "patch")
    apply_patch(fresh, tmp_path / "patch")
    assert fresh.trained == [1, 2]
    assert torch.equal(logits_of(fresh), logits_of(policy))


def test_lora_is_multiplied_into_the_weights_that_are_deployed(load: Load, tmp_path: Path) -> None:
    policy = trained_lora(load(quantize="none"))
    save_patch(policy, tmp_path / "patch")
    tensors = deployed_tensors(policy.source, tmp_path / "patch")
    merge_patch(policy.source, tensors, tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(load(tmp_path / "merged", "none")), logits_of(policy), rtol=1e-4, atol=1e-4
    )


# --- merging


@CHECKPOINTS
@pytest.mark.parametrize("train", [trained, trained_lora])
def test_patch_and_base_are_the_merged_checkpoint_tensor_for_tensor(
    load: Load, tmp_path: Path, checkpoint: dict[str, Any], train: Callable[[Policy], Policy]
) -> None:
    source = load(**checkpoint).source
    save_patch(train(load(**checkpoint)), tmp_path / "patch")
    tensors = deployed_tensors(source, tmp_path / "patch")
    merge_patch(source, tensors, tmp_path / "merged")
    expected, merged = {**tensors_in(source.folder), **tensors}, tensors_in(tmp_path / "merged")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_what_is_deployed_is_the_saved_patch(load: Load, patch: Path) -> None:
    deployed, saved = deployed_tensors(load().source, patch), load_file(patch / "patch.safetensors")
    assert deployed.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in deployed.items())


@CHECKPOINTS
def test_the_merged_checkpoint_has_the_bases_files(
    load: Load, tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    policy = trained(load(**checkpoint))
    written = merge_patch(policy.source, policy.deployed_blocks(as_stored=True), tmp_path / "merged")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "merged").iterdir()}
    assert sizes.keys() == {file.name for file in policy.source.folder.iterdir()}
    assert written == sum(sizes.values())


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text"])
def test_plain_transformers_generates_what_the_policy_does(
    load: Load, tmp_path: Path, architecture: str
) -> None:
    policy = trained(load(architecture, "none"))
    merge_patch(policy.source, policy.deployed_blocks(as_stored=True), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer("What is 3 + 4?", return_tensors="pt")
    generated = merged.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt.input_ids.size(1) :]
    own = sample(policy, prompt.input_ids.tolist(), Sampling(max_new_tokens=16, temperature=0))
    assert own.completions() == [generated.tolist()]


def test_merging_into_an_empty_folder_works(load: Load, tmp_path: Path) -> None:
    policy = trained(load())
    (tmp_path / "merged").mkdir()
    merge_patch(policy.source, policy.deployed_blocks(as_stored=True), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_folder_with_something_in_it_is_not_touched(load: Load, tmp_path: Path) -> None:
    policy = trained(load())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not empty; choose another --out"):
        merge_patch(policy.source, policy.deployed_blocks(as_stored=True), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_refused_before_anything_is_written(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = trained(load())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="needs 0.00 GiB of disk space and 0.00 GiB are free"):
        merge_patch(policy.source, policy.deployed_blocks(as_stored=True), tmp_path / "new" / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train", [trained, trained_lora])
def test_a_4bit_base_is_not_merged(
    load: Load, stored_in_4bit: Path, tmp_path: Path, train: Callable[[Policy], Policy]
) -> None:
    policy = train(load(stored_in_4bit))
    save_patch(policy, tmp_path / "patch")
    words = "is stored in 4-bit, .* train on the unquantized checkpoint"
    if policy.adapter is not None:
        with pytest.raises(InputError, match=words):
            deployed_tensors(policy.source, tmp_path / "patch")
    with pytest.raises(InputError, match=words):
        merge_patch(policy.source, {}, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


def test_a_merge_that_fails_halfway_leaves_nothing(load: Load, tmp_path: Path) -> None:
    policy = trained(load(shard_size="200KB"))
    tensors = policy.deployed_blocks(as_stored=True)
    with files_up_to(100_000), pytest.raises(OSError, match="File too large"):
        merge_patch(policy.source, tensors, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
