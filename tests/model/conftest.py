"""Small model folders, and a cache of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from midtune.model.quantize import nf4_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One safetensors file with two tensors, and a config."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def stored_in_4bit(random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen3 checkpoint as transformers saves it in bitsandbytes 4-bit."""
    plain, folder = random_checkpoint("qwen3"), tmp_path_factory.mktemp("qwen3-4bit")
    for file in plain.glob("*token*"):
        shutil.copy(file, folder)
    settings = nf4_config(torch.float32, keep=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
