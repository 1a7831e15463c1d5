"""GGUF files become folders that transformers loads, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midtune.errors import InputError
from midtune.model.gguf_blocks import inner_name, swap_blocks
from midtune.model.loading import load_policy
from midtune.model.sources import checkpoint_files, resolve
from tests.model import gguf_families, toy_gguf
from tests.model.toy_training import perturb
from tests.test_architectures import compare

# Of each kind of weights that a reader changes: experts, norms, convolutions, transposed ones.
FAST = {"qwen3_moe", "gemma3", "lfm2", "gpt2"}
FAMILIES = [
    pytest.param(family, marks=() if family in FAST else pytest.mark.slow)
    for family in gguf_families.FAMILIES
]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_that_transformers_reads_is_trained_and_written_back(
    tmp_path: Path, own_cache: Path, family: str
) -> None:
    path = gguf_families.write(tmp_path / "toy.gguf", family)
    policy = load_policy(resolve(str(path)), quantize="none", device="cpu")
    assert max(compare(policy, 2)) < 1e-4
    policy.thaw(2)
    perturb(policy)
    trained = policy.deployed_blocks(as_stored=True)
    if family in ("mamba", "qwen35"):
        # A logarithm, and rows that another reader moves.
        with pytest.raises(InputError, match="cannot be turned around; export with --to hf"):
            swap_blocks(path, trained, [2], tmp_path / "out.gguf")
        return
    held, _ = swap_blocks(path, trained, [2], tmp_path / "out.gguf")
    again = load_policy(resolve(str(tmp_path / "out.gguf")), quantize="none", device="cpu")
    again.thaw(2)
    parameters = again.trained_parameters()
    for name, value in policy.trained_parameters().items():
        torch.testing.assert_close(parameters[name], value, rtol=2e-3, atol=2e-3)
    for name, value in trained.items():
        torch.testing.assert_close(held[inner_name(name)], value.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("arch", "words"),
    [("t5", "which is an encoder-decoder"), ("deci", "transformers cannot read from GGUF")],
)
def test_families_that_are_not_trained_are_refused(tmp_path: Path, arch: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve(str(toy_gguf.write(tmp_path / "toy.gguf", arch=arch)))


def test_a_gguf_becomes_a_folder_that_transformers_loads(tmp_path: Path, own_cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = toy_gguf.write(tmp_path / "toy.gguf", eot=3)
    told: list[tuple[str, int | None, int | None]] = []
    source = resolve(str(path), progress=lambda *args: told.append(args))

    assert (source.name, source.revision, source.folder.parent) == (str(path), None, own_cache)
    assert told[0] == ("converting toy.gguf", None, None)
    assert told[-1] == ("converting toy.gguf", 21, 21)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="toy.gguf", dtype=torch.float32)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float()), name
    assert model.generation_config.eos_token_id == [2, 3]
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    assert tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "abe"}]
    assert tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] == [1, 12, 7, 2]
    assert set(checkpoint_files(source.folder)) == set(direct.state_dict())


def test_a_gguf_is_converted_once_until_it_changes(tmp_path: Path) -> None:
    path = toy_gguf.write(tmp_path / "toy.gguf")
    first = resolve(str(path)).folder
    made = first.stat().st_ino
    assert resolve(str(path)).folder == first and first.stat().st_ino == made
    toy_gguf.write(path, scale=2.0)
    assert resolve(str(path)).folder != first


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    path = toy_gguf.write(tmp_path / "tied.gguf", without={"output.weight"})
    files = checkpoint_files(resolve(str(path)).folder)
    assert "lm_head.weight" not in files
    assert "model.embed_tokens.weight" in files


def test_values_beyond_half_precision_stay_in_single(tmp_path: Path) -> None:
    folder = resolve(str(toy_gguf.write(tmp_path / "large.gguf", scale=1e5))).folder
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_gguf_that_lacks_a_tensor_is_refused(tmp_path: Path, own_cache: Path) -> None:
    path = toy_gguf.write(tmp_path / "toy.gguf", without={"blk.1.ffn_up.weight"})
    with pytest.raises(
        InputError, match=r"finds no values in .* for 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        resolve(str(path))
    assert not list(own_cache.glob("[!.]*"))


def test_an_unread_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a `nonsense` model that transformers cannot read"):
        resolve(str(toy_gguf.write(tmp_path / "toy.gguf", arch="nonsense")))


def test_a_cut_gguf_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = toy_gguf.write(tmp_path / "toy.gguf")
    whole = path.read_bytes()
    for length in (len(whole) - 1000, 900, 60, 10, 4):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut short|damaged"):
            resolve(str(path))


def test_a_quantization_type_that_cannot_be_unpacked_is_named(tmp_path: Path) -> None:
    path = toy_gguf.write(tmp_path / "toy.gguf")
    described = path.read_bytes()
    # The type of each tensor, F32, follows its shape.
    place = described.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    for kind, words in (
        (26, "holds tensors in I32, which"),
        (77, "quantization type 77 of GGUF"),
    ):
        path.write_bytes(described[:place] + int(kind).to_bytes(4, "little") + described[place + 4 :])
        with pytest.raises(InputError, match=words):
            resolve(str(path))
