"""GGUF files become folders that transformers loads, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midtune.errors import InputError
from midtune.model.sources import checkpoint_files, resolve
from tests.model import toy_gguf


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
    with pytest.raises(InputError, match=r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
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
