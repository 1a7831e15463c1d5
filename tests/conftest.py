"""Small random models of every supported architecture, written to disk as real checkpoints, and a hub."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from midtune.model.cache import cache_folder

if TYPE_CHECKING:
    from midtune.model.policy import Policy

os.environ["HF_HUB_OFFLINE"] = "1"
# Prepared models are this machine's; base models' scores are kept for this session alone.
_MODELS = cache_folder()
_SESSION = tempfile.TemporaryDirectory()
_MODELS.mkdir(parents=True, exist_ok=True)
(Path(_SESSION.name) / "models").symlink_to(_MODELS)
os.environ["MIDTUNE_CACHE"] = _SESSION.name
# Under nohup or in a shell's background they are ignored, and what is ignored stays so in runs that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if WORKERS := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(WORKERS))))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the whole suite among processes of pytest-xdist; what is named is run in this one."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and option.markexpr == "not slow"
    if whole and not WORKERS and not option.usepdb and getattr(option, "numprocesses", 0) is None:
        # Each holds up to 3 GiB.
        option.numprocesses = min(CORES, psutil.virtual_memory().total // 2**32)
        option.dist = "worksteal"


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of the search for garbage, which every run begins several times."""
    gc.collect()
    gc.freeze()


COMMON = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than usual, so that random models have opinions and wrong masks show.
    "initializer_range": 0.15,
}
ARCHITECTURES = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
}
_QWEN2 = {"use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
# The study's seven models, narrow: an architecture, and what of their shape matters to attention and the head.
STUDY: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3-1.7b": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-4b": ("qwen3", {"head_dim": 16, "num_attention_heads": 8, "tie_word_embeddings": True}),
    "qwen3-8b": ("qwen3", {"head_dim": 8, "num_attention_heads": 8, "tie_word_embeddings": False}),
    "qwen2.5-math-1.5b": ("qwen2", {**_QWEN2, "hidden_size": 96, "num_attention_heads": 12}),
    "qwen2.5-1.5b": ("qwen2", {**_QWEN2, **_ROPE, "hidden_size": 96, "num_attention_heads": 12}),
    "qwen2.5-3b": ("qwen2", {**_QWEN2, **_ROPE, "num_attention_heads": 16}),
    "r1-distill-qwen-7b": (
        "qwen2",
        {
            **_QWEN2,
            "hidden_size": 112,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
}


def write_checkpoint(
    folder: Path, architecture: str, *, shard_size: str = "5GB", **overrides: object
) -> None:
    """Write a random model and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, **{**COMMON, **ARCHITECTURES.get(architecture, {}), **overrides}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: architecture name → folder with a random checkpoint and a tokenizer (made once)."""
    made: dict[str, Path] = {}

    def make(architecture: str = "qwen3", **overrides: object) -> Path:
        key = f"{architecture}-{sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            write_checkpoint(folder, architecture, **overrides)  # type: ignore[arg-type]
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def load(random_checkpoint: Callable[..., Path]) -> Callable[..., Policy]:
    """A function: architecture name, or a checkpoint's folder → a new policy on the CPU."""
    from midtune.model.loading import load_policy
    from midtune.model.sources import resolve

    def load(architecture: str | Path = "qwen3", quantize: str = "nf4", **overrides: object) -> Policy:
        given = isinstance(architecture, Path)
        folder = architecture if given else random_checkpoint(architecture, **overrides)
        return load_policy(resolve(str(folder)), quantize=quantize, device="cpu")

    return load


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """What a step would hold is worked out once, however many runs take the same step."""
    from midtune.planning import search

    def cached(trace: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[str, Any] = {}

        def traced(model: Any, *step: Any, **settings: Any) -> Any:
            key = repr((vars(model), step, settings))
            if key not in known:
                known[key] = trace(model, *step, **settings)
            return known[key]

        return traced

    with pytest.MonkeyPatch.context() as patched:
        for name in ("sampling", "block_update", "whole_update"):
            patched.setattr(search, name, cached(getattr(search, name)))
        yield


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that takes an address as the hub's; what comes from there is kept in `tmp_path / "hub"`."""
    from huggingface_hub import constants

    def use(address: str) -> None:
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    return use
