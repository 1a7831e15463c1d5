"""Every form in which a model can be given, and every way in which it can be unusable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from midtune.errors import InputError
from midtune.model import sources
from midtune.model.sources import Source, checkpoint_files, resolve

Change = Callable[[Path], Any]


def write(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def rename_weights(name: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def clear(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, shard in shards.items():
        save_file({tensor: torch.ones(2)}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def test_a_folder_is_its_own_source(folder: Path) -> None:
    source = resolve(str(folder))
    assert source == Source(str(folder), folder, None)
    assert checkpoint_files(folder) == dict.fromkeys("ab", folder / "model.safetensors")


def test_shards_are_found_through_the_index(sharded: Path) -> None:
    files = checkpoint_files(resolve(str(sharded)).folder)
    assert files == {
        "a": sharded / "model-00001-of-00002.safetensors",
        "b": sharded / "model-00002-of-00002.safetensors",
    }


def test_a_rewritten_file_is_read_again(folder: Path) -> None:
    checkpoint_files(folder)
    save_file({"c": torch.ones(7)}, folder / "model.safetensors")
    assert set(checkpoint_files(folder)) == {"c"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            r"holds no config\.json but model\.safetensors; give",
        ),
        (clear, r"holds no config\.json but nothing"),
        (rename_weights("pytorch_model.bin"), r"only as pytorch_model\.bin, .*; convert .*save_pretrain"),
        # A trainer's state is no weights.
        (rename_weights("optimizer.pt"), r"holds a config\.json but no \*\.safetensors"),
        (write("adapter_config.json", "{}"), "is a PEFT adapter, not a whole model; merge it"),
        (write("config.json", "{"), r"config\.json is not valid JSON"),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_there(folder: Path, change: Change, words: str) -> None:
    change(folder)
    with pytest.raises(InputError, match=words):
        resolve(str(folder))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"the shard model-00002-of-00002\.safetensors, which is missing"):
        resolve(str(sharded))


def test_a_shard_outside_the_folder_is_not_followed(sharded: Path) -> None:
    shutil.copy(sharded / "model-00002-of-00002.safetensors", sharded.parent / "x.safetensors")
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"b": "../x.safetensors"}}')
    with pytest.raises(InputError, match=r"the shard \.\./x\.safetensors, which is missing"):
        resolve(str(sharded))


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    save_file({"other": torch.ones(2)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors lacks b, which"):
        resolve(str(sharded))


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors, .* neither"):
        resolve(str(sharded))


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 40, b"\x09" + bytes(7) + b"not json!", b"\x02" + bytes(7) + b"[]"],
)
def test_a_damaged_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is cut short or damaged .*; fetch it again"):
        resolve(str(folder))


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"1"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{len(content)} bytes\) is cut short or damaged"):
            resolve(str(folder))


# --- names


def test_tiny_is_the_bundled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("tiny") == Source("tiny", sources.TINY, None)
    with pytest.raises(InputError, match="revision main was asked for, but tiny is not a hub model"):
        resolve("tiny", "main")
    monkeypatch.setattr(sources, "TINY", tmp_path / "absent")
    with pytest.raises(InputError, match="install midtune again"):
        resolve("tiny")


@pytest.mark.parametrize(("name", "near"), [("smollm2", "smollm2-135m"), ("tinny", "tiny"), ("Tiny", "tiny")])
def test_an_unknown_name_lists_what_is_accepted(name: str, near: str) -> None:
    with pytest.raises(
        InputError, match=f"`{name}` is not a model .* `tiny`, `smollm2-135m`, .*nearest name: `{near}`"
    ):
        resolve(name)


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing.gguf", "~/nothing-of-the-kind"])
def test_a_path_that_does_not_exist_is_not_looked_up(name: str) -> None:
    with pytest.raises(InputError, match=f"there is no file or folder {name}"):
        resolve(name)


def test_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"give the folder that also holds its config\.json"):
        resolve(str(folder / "model.safetensors"))
    with pytest.raises(InputError, match="is not a GGUF file"):
        resolve(str(folder / "config.json"))
