"""Blocks put into a GGUF come out of transformers' reader as they went in, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from midtune.errors import InputError
from midtune.model.gguf_blocks import inner_name, swap_blocks
from tests.model import toy_gguf


def read(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return dict(model.state_dict())


def trained(path: Path, block: int) -> dict[str, torch.Tensor]:
    """The block's tensors, each changed a little, in values that fp16 holds."""
    source = torch.Generator().manual_seed(0)
    own = {name: tensor for name, tensor in read(path).items() if f".{block}." in name}
    return {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=source)).half().float()
        for name, tensor in own.items()
    }


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_file_read_back_has_the_trained_block_and_the_bytes_of_all_else(
    tmp_path: Path, arch: str
) -> None:
    base = toy_gguf.write(tmp_path / "toy.gguf", arch=arch, matrices=np.float16)
    tensors = trained(base, 1)
    held, kind = swap_blocks(base, tensors, [1], tmp_path / "out.gguf")

    assert kind == "F16"
    before, after = read(base), read(tmp_path / "out.gguf")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        # Gemma's norms are stored plus one, in fp32.
        torch.testing.assert_close(tensor, tensors.get(name, before[name]), rtol=0, atol=2e-7)
    for name in tensors:
        assert torch.equal(held[inner_name(name)], after[name])
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(tmp_path / "out.gguf")
    begin, end = old.tensors[0].field.offset, new.tensors[0].field.offset
    assert bytes(old.data[:begin]) == bytes(new.data[:end])
    for was, now in zip(old.tensors, new.tensors, strict=True):
        assert (was.name, was.tensor_type) == (now.name, now.tensor_type)
        assert (was.data.tobytes() == now.data.tobytes()) == (not was.name.startswith("blk.1."))


def test_untrained_blocks_in_their_own_type_give_the_same_file(tmp_path: Path) -> None:
    base = toy_gguf.write(tmp_path / "toy.gguf", matrices=np.float16)
    same = {name: tensor for name, tensor in read(base).items() if ".0." in name}
    swap_blocks(base, same, [0], tmp_path / "out.gguf", "file")
    assert (tmp_path / "out.gguf").read_bytes() == base.read_bytes()


def test_types(tmp_path: Path) -> None:
    base = toy_gguf.write(tmp_path / "toy.gguf", matrices=np.float16)
    tensors = trained(base, 0)

    def kinds(dtype: str | None, change: torch.dtype = torch.float32) -> set[str]:
        given = {name: tensor.to(change) for name, tensor in tensors.items()}
        (tmp_path / "out.gguf").unlink(missing_ok=True)
        swap_blocks(base, given, [0], tmp_path / "out.gguf", dtype)
        read = gguf.GGUFReader(tmp_path / "out.gguf").tensors
        return {tensor.tensor_type.name for tensor in read if tensor.name.startswith("blk.0.")}

    assert kinds("bf16") == {"F32", "BF16"}  # norms stay F32
    assert kinds(None, torch.bfloat16) == {"F32", "BF16"}
    assert kinds("fp32") == {"F32"}
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 7e4  # more than fp16 holds
    tensors["model.layers.0.mlp.up_proj.weight"][1:] *= 1e5
    with pytest.raises(InputError, match=r"its blk\.0\.ffn_up\.weight is of another model"):
        kinds(None)


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    base = toy_gguf.write(tmp_path / "toy.gguf")
    tensors = trained(base, 1)
    random = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    for given, words in (
        (random, "is of another model"),
        (
            {name.replace("layers.1.", "layers.5."): t for name, t in tensors.items()},
            "it has no weights of such names",
        ),
        ({name: tensor[:2] for name, tensor in tensors.items()}, "and shapes"),
    ):
        with pytest.raises(InputError, match=f"the blocks do not fit .*{words}.*--base"):
            swap_blocks(base, given, [1], tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


def test_a_type_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = toy_gguf.write(tmp_path / "toy.gguf", matrices=np.float16)

    def refuse(*_: object) -> None:
        raise NotImplementedError

    given = trained(base, 1)
    monkeypatch.setattr(gguf, "quantize", refuse)
    with pytest.raises(InputError, match="as F32, which the gguf package cannot write; leave --dtype file"):
        swap_blocks(base, given, [1], tmp_path / "out.gguf", "file")
