"""Files of models that mean harm: each is one sentence, soon, and without much memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.model import gguf
from midtune.model.configs import config_of
from midtune.model.loading import load_policy
from midtune.model.sources import TINY, resolve

DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
MIB = 2**20
Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def header(content: str | dict[str, Any], body: bytes = b"", length: int | None = None) -> Change:
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    start = struct.pack("<Q", len(data) if length is None else length)
    return lambda folder: (folder / "model.safetensors").write_bytes(start + data + body)


def tensors(**described: Any) -> Change:
    """A header of as many tensors as the model has, one of them hostile."""
    sound = {f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(200)}
    return header({**sound, "t0": {**sound["t0"], **described}}, bytes(200))


def in_place_of(name: str, make: Change) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


FILES: dict[str, tuple[Change, str]] = {
    "blocks": (config(num_hidden_layers=10**9), "num_hidden_layers 1000000000, and at most 10,000"),
    "blocks without weights": (config(num_hidden_layers=9999), "promises 9,999 blocks"),
    "heads": (config(num_attention_heads=10**9), "num_attention_heads 1000000000"),
    "labels": (config(num_labels=10**8), "num_labels 100000000"),
    "a count of digits": (config(num_labels=10**4000), "characters left out"),
    "blocks in words": (config(num_hidden_layers="many"), "config.json cannot be read (Validation error"),
    "fewer than none": (config(num_hidden_layers=-1), "must be equal to the number of `layer_types`"),
    "width": (config(hidden_size=10**30), "Overflow"),
    "no heads": (config(num_attention_heads=0), "cannot be loaded"),
    "head width": (config(head_dim=10**10), "cannot be loaded"),
    "words": (config(vocab_size=10**12), "cannot be loaded"),
    "layer types": (config(layer_types=["x"] * 10**5), "layer_types"),
    "a model type that is a list": (config(model_type=["a"]), "unhashable"),
    "a type of numbers": (config(dtype="float999"), "float999"),
    "rope": (config(rope_parameters=[1]), "rope_parameters"),
    "quantization": (config(quantization_config="x"), "config.json cannot be read"),
    "quantization without a method": (config(quantization_config={}), "cannot be loaded"),
    "another quantization": (
        config(quantization_config={"quant_method": 3}),
        "is stored with 3 quantization",
    ),
    "code": (config(model_type="evil", auto_map={"AutoConfig": "evil.Config"}), "custom code"),
    "deep configuration": (text("config.json", DEEP), "config.json is not valid JSON"),
    "a configuration of digits": (text("config.json", '{"a":' + "9" * 9999 + "}"), "not valid JSON"),
    "a folder": (in_place_of("config.json", Path.mkdir), "holds no config.json"),
    "a pipe": (in_place_of("config.json", os.mkfifo), "config.json is no regular file"),
    "a pipe beside": (lambda folder: os.mkfifo(folder / "merges.txt"), "merges.txt is no regular file"),
    "zeros without end": (
        in_place_of("config.json", lambda path: path.symlink_to("/dev/zero")),
        "config.json is no regular file",
    ),
    "a tokenizer of 1 TB": (
        lambda folder: os.truncate(folder / "tokenizer.json", 2**40),
        "tokenizer.json has 1,099,511,627,776 bytes",
    ),
    "header length": (header({}, length=2**63), "header too large"),
    "deep header": (header(DEEP), "recursion limit exceeded"),
    "header of a list": (header("[]"), "invalid type: sequence"),
    "header without end": (
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}}),
        "invalid JSON in header",
    ),
    "header of 64 GB": (
        lambda folder: (
            header({}, length=2**36)(folder),
            os.truncate(folder / "model.safetensors", 2**36 + 8),
        ),
        "header too large",
    ),
    "weights of 1 TB": (lambda folder: os.truncate(folder / "model.safetensors", 2**40), "is cut short or"),
    "no weights": (header({}), "the weights beside it are 0 tensors"),
    "negative offsets": (tensors(data_offsets=[-4, 1]), "invalid value"),
    "shape": (tensors(shape=[2**62, 2**62]), "overflow"),
    "kind of number": (tensors(dtype="X9"), "unknown variant `X9`"),
    "deep tokenizer": (text("tokenizer.json", "[" * 200_000), "recursion"),
    "empty tokenizer": (text("tokenizer.json", "{}"), "that can be read"),
    "tokenizer of a list": (text("tokenizer_config.json", "[]"), "that can be read"),
    "longest text": (text("tokenizer_config.json", '{"model_max_length": "x"}'), "that can be read"),
    "end token": (text("tokenizer_config.json", '{"eos_token": 5}'), "that can be read"),
    "deep generation settings": (text("generation_config.json", DEEP), "recursion"),
}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Loaded before, so that their time and memory are not counted."""
    load_policy(resolve("tiny"), device="cpu")


@pytest.fixture(autouse=True)
def little(tmp_path: Path) -> Iterator[None]:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - started < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 256 * MIB


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_model_is_one_sentence(name: str, tmp_path: Path) -> None:
    change, words = FILES[name]
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    change(folder)
    with pytest.raises(InputError) as caught:
        load_policy(resolve(str(folder)), device="cpu")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10**9}, {"model_type": ["a"]}, {"head_dim": "x"}])
def test_a_plan_of_a_hostile_configuration_is_one_sentence(values: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config(**values)(tmp_path / "model")
    with pytest.raises(InputError, match="config.json"):
        config_of(str(tmp_path / "model"))


def string(word: str | bytes) -> bytes:
    data = word.encode() if isinstance(word, str) else word
    return struct.pack("<Q", len(data)) + data


def number(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<IQ", 10, value)


NAME = string("general.architecture") + struct.pack("<I", 8) + string("llama")
TENSOR = string("t") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)


def gguf_file(
    pairs: list[bytes], described: bytes = TENSOR, *, counts: tuple[int, int] | None = None
) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (1, len(pairs))))
    return start + b"".join(pairs) + described + bytes(1024)


@pytest.mark.parametrize(
    "content",
    {
        "pairs": gguf_file([NAME], counts=(1, 2**63)),
        "tensors": gguf_file([NAME], counts=(2**63, 1)),
        "a long text": gguf_file([struct.pack("<Q", 2**62)]),
        "a text of 1 TB": gguf_file([struct.pack("<Q", 2**40)]),
        "a long list": gguf_file([string("a") + struct.pack("<IIQ", 9, 10, 2**62)]),
        "a list of texts": gguf_file([string("a") + struct.pack("<IIQ", 9, 8, 2**62)]),
        "lists in lists": gguf_file([string("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10**5]),
        "dimensions": gguf_file([NAME], string("t") + struct.pack("<I", 2**32 - 1)),
        "no alignment": gguf_file([NAME, number("general.alignment", 0)]),
        "alignment in words": gguf_file([string("general.alignment") + struct.pack("<I", 8) + string("x")]),
        "parts in words": gguf_file([string("split.count") + struct.pack("<I", 8) + string("x")]),
        "a kind of value": gguf_file([string("a") + struct.pack("<I", 99)]),
        "a kind of tensor": gguf_file([NAME], string("t") + struct.pack("<IQIQ", 1, 4, 999, 0)),
        "blocks": gguf_file([NAME, number("llama.block_count", 10**9)]),
        "width": gguf_file([NAME, number("llama.embedding_length", 10**9)]),
        "heads": gguf_file([NAME, number("llama.attention.head_count", 10**9)]),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_hostile_gguf_is_one_sentence(content: tuple[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content[1])
    with pytest.raises(InputError, match="is a damaged GGUF file: its header cannot be read; fetch it again"):
        gguf.read_header(path)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (string("t") + struct.pack("<IQQIQ", 2, 2**40, 2**20, 0, 0), "is cut short"),
        (TENSOR, "holds a `llama` model that transformers cannot read from GGUF"),
    ],
)
def test_a_gguf_that_holds_no_model_is_one_sentence(described: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([NAME], described))
    with pytest.raises(InputError) as caught:
        resolve(str(path))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700
