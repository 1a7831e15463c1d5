"""Convert GGUF files to safetensors folders in midtune's cache, once per file.

transformers takes half a minute to read a GGUF of 135M parameters, at every start; a folder loads in seconds.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from midtune.errors import WHY, InputError, explained
from midtune.model.cache import Progress, build_once, cache_folder

# Part of every cache key: raise it when the conversion's output changes.
FORMAT = 1

# GGUF's number of each scalar type → its format character in `struct`.
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Limits above any real file's: bytes of one text, bytes before the tensors, dimensions of one tensor.
_MOST_TEXT_BYTES, _MOST_HEADER_BYTES, _MOST_DIMENSIONS = 2**24, 2**29, 8
# Above the number of any quantization type that there may be.
_MOST_TYPES = 256
# Metadata keys for a model's dimensions; none exceeds the length of the model's largest tensor.
_LENGTHS = (
    *("embedding_length", "feed_forward_length", "vocab_size"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")),
)
_MIB = 1 << 20


@dataclass(frozen=True)
class Header:
    """Header of a GGUF file: its scalar metadata, its parameter count, where its data ends, and how it is quantized."""

    metadata: dict[str, Any]
    parameters: int
    end_bytes: int
    types: frozenset[int]


def read_header(path: Path) -> Header:
    """Read a GGUF's metadata without its arrays; raises InputError if it is cut short or not of version 2 or 3."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file; give a GGUF file, a model folder or a hub id.")
        with explained(f"{path} is a damaged GGUF file: its header cannot be read; fetch it again."):
            version, tensors, pairs = _unpack(file, "IQQ")
            if version not in (2, 3):
                raise InputError(
                    f"{path} has GGUF version {version}, but 2 and 3 are read; convert it again."
                )
            return _header(file, tensors, pairs, path)


def _header(file: BinaryIO, tensors: int, pairs: int, path: Path) -> Header:
    """Read `pairs` of metadata and the tensor descriptions; raises on impossible ones."""
    import gguf

    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = _string(file)
        if (value := _value(file, *_unpack(file, "I"))) is not None:
            metadata[key] = value
        if file.tell() > _MOST_HEADER_BYTES:
            raise ValueError("too long")
    parameters, last, longest = 0, 0, 0
    types: set[int] = set()
    for _ in range(tensors):
        _string(file)
        (dims,) = _unpack(file, "I")
        if dims > _MOST_DIMENSIONS:
            raise ValueError("too many dimensions")
        shape = _unpack(file, f"{dims}Q")
        count = math.prod(shape)
        kind, offset = _unpack(file, "IQ")
        if max(gguf.GGMLQuantizationType) < kind < _MOST_TYPES:
            raise InputError(
                f"{path} holds tensors in quantization type {kind} of GGUF, which the gguf package here does not know; "
                "update that package, or use the safetensors of that model."
            )
        types.add(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        parameters += count
        last = max(last, offset + count // block * block_bytes)
        longest = max(longest, *shape, 0)
    alignment = _whole(metadata, "general.alignment", 32)
    parts = _whole(metadata, "split.count", 1)
    architecture = metadata.get("general.architecture")
    sizes = {name: _whole(metadata, f"{architecture}.{name}", 0) for name in _LENGTHS}
    blocks = _whole(metadata, f"{architecture}.block_count", 0)
    if alignment < 1 or (parts <= 1 and (blocks > tensors or max(sizes.values()) > longest)):
        raise ValueError("sizes that its tensors do not have")
    end_bytes = -(-file.tell() // alignment) * alignment + last
    return Header(metadata, parameters, end_bytes, frozenset(types))


def _check_types(path: Path, types: Iterable[int]) -> None:
    """Raise InputError if a quantization type cannot be unpacked."""
    import gguf
    import numpy as np

    for kind in sorted(types):
        named = gguf.GGMLQuantizationType(kind)
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[named][1]), np.uint8), named)
        except NotImplementedError:
            raise InputError(
                f"{path} holds tensors in {named.name}, which the gguf package cannot unpack; use a file in another "
                "quantization, such as Q4_K_M, or the safetensors of that model."
            ) from None


def _whole(metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int):
        raise ValueError(f"{key} is no whole number")
    return value


def cached_conversion(path: Path, progress: Progress) -> Path:
    """The safetensors folder of a GGUF file, converted on the first call.

    Raises InputError if the file is damaged or one part of several, the disk has no room, or as `convert`.
    """
    header = read_header(path)
    stat = path.stat()
    if stat.st_size < header.end_bytes:
        raise InputError(
            f"{path} is cut short: it has {stat.st_size:,} bytes and its header promises {header.end_bytes:,}; "
            "fetch it again."
        )
    if int(header.metadata.get("split.count", 1)) > 1:
        raise InputError(
            f"{path} is one part of {header.metadata['split.count']}; join them with "
            "`llama-gguf-split --merge` and give the result."
        )
    seen = hashlib.sha256(f"{FORMAT} {stat.st_size} {stat.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        seen.update(file.read(_MIB))
        file.seek(max(0, stat.st_size - _MIB))
        seen.update(file.read(_MIB))
    target = cache_folder() / f"{path.stem}-{seen.hexdigest()[:16]}"
    need = int(header.parameters * 2.2)
    return build_once(
        target, lambda work: convert(path, work / "model", progress), need_bytes=need, progress=progress
    )


def convert(path: Path, out: Path, progress: Progress) -> Path:
    """Write a GGUF file to `out` as config, safetensors and a tokenizer with its chat template; returns `out`.

    Raises InputError if transformers does not read the architecture, or tensors are missing.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from midtune.model.architectures import built, check_trainable, text_class
    from midtune.model.quantize import clear_quantized_markers

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    header = read_header(path)
    _check_types(path, header.types)
    metadata = header.metadata
    kind = metadata.get("general.architecture", "unknown")
    unread = (
        f"{path} holds a `{kind}` model that transformers cannot read from GGUF ({WHY}); "
        "use the safetensors of that model."
    )
    kept = (OSError, torch.OutOfMemoryError)
    with reported(progress, f"converting {path.name}"), explained(unread, keep=kept):
        config = AutoConfig.from_pretrained(**where)
        check_trainable(config, str(path))
        with torch.device("meta"):
            made: Any = text_class(built(config))
        tokenizer = AutoTokenizer.from_pretrained(**where)
        loaded, info = made.from_pretrained(
            **where, config=config, dtype=torch.float32, output_loading_info=True
        )
    if info["missing_keys"]:
        raise InputError(
            f"transformers finds no values in {path} for {len(info['missing_keys'])} tensors of its model, the first "
            f"being {min(info['missing_keys'])}; fetch a complete file, or use the safetensors of that model."
        )
    # transformers refuses to convert and save a model marked as GGUF.
    clear_quantized_markers(loaded)
    # Save it under the names that models of its kind are published with.
    vars(loaded).pop("_weight_conversions", None)
    # fp16 rounds by at most 2^-11 of a weight: for SmolLM2's Q4_1 file a relative error of 1.9e-4 (bfloat16:
    # 1.4e-3), far below that of 4-bit rounding, at half the bytes of float32.
    limit = torch.finfo(torch.float16).max
    if all(bool(weight.abs().max() <= limit) for weight in loaded.parameters()):
        loaded.half()
    stops = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    stop_ids = list(dict.fromkeys(int(i) for i in stops if i is not None))
    if loaded.generation_config is not None and stop_ids:
        loaded.generation_config.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@contextmanager
def reported(progress: Progress, message: str) -> Iterator[None]:
    """Send the progress bar of transformers' GGUF reader to `progress`."""
    from transformers import modeling_gguf_pytorch_utils as reader

    progress(message, None, None)

    def watch(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(items)
        for done, item in enumerate(listed):
            progress(message, done, len(listed))
            yield item
        progress(message, len(listed), len(listed))

    bar = getattr(reader, "tqdm", None)
    setattr(reader, "tqdm", watch)  # noqa: B010
    try:
        yield
    finally:
        setattr(reader, "tqdm", bar)  # noqa: B010


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > _MOST_TEXT_BYTES:
        raise ValueError("too long")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("cut short")
    return text.decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    item, count = _unpack(file, "IQ")
    if item in _SCALARS:
        file.seek(struct.calcsize(f"<{_SCALARS[item]}") * count, os.SEEK_CUR)
    else:
        for _ in range(count):
            _value(file, item)
    return None
