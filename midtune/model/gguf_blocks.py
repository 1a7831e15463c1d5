"""Put trained blocks into a GGUF file, whose other tensors and metadata stay byte for byte.

A GGUF names, orders and shifts weights differently from a checkpoint: converters permute the rows of Llama's queries
and keys, and add 1 to Gemma's norms. transformers' own reader shows how. It is given a file whose weights are their
own places, and what it makes of them says where each weight goes.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from midtune.errors import WHY, InputError, explained
from midtune.model.architectures import built
from midtune.model.blocks import find_blocks
from midtune.model.cache import silent
from midtune.model.gguf import read_header, reported
from midtune.model.names import Names

# In this type or its tensor's own, GGUF name → type and values.
Stored = dict[str, tuple[Any, NDArray[Any]]]
# fp32 holds whole numbers exactly up to 2^24; two of these digits number any tensor's weights.
_DIGIT = 2**20
UNTURNED = (
    "what transformers makes of the weights in {} cannot be turned around; export with --to hf and use llama.cpp's "
    "converter."
)
# 2-bit rounding moves a weight matrix by about a third of its length, and another model's differs by more than all.
_FARTHEST = 0.7


def inner_name(name: str) -> str:
    """A tensor's name from its block's number on: `15.self_attn.q_proj.weight`."""
    found = re.search(r"(?:^|\.)(\d+\..+)$", name)
    return found[1] if found else name


def swap_blocks(
    base: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Sequence[int],
    out: Path,
    dtype: str | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """Write the GGUF file `base` to `out` with the weights of `blocks` replaced by `tensors`, under checkpoint names.

    `dtype` is bf16, fp16, fp32 or `file`: the type of each replaced tensor; None: that of `tensors`, fp16 for fp32.
    Tensors in F32, such as norms, stay so. Returns the weights as `out` holds them, by `inner_name`, and their type.
    Raises InputError if the file is not the base of these blocks, or cannot take them.
    """
    import gguf

    read_header(base)
    reader = gguf.GGUFReader(base)
    old = {
        tensor.name: tensor
        for tensor in reader.tensors
        if any(tensor.name.startswith(f"blk.{block}.") for block in blocks)
    }
    unfit = (
        f"the blocks do not fit {base} ({WHY}); give the GGUF of the model they were trained on with --base."
    )
    with explained(unfit, keep=(OSError, InputError)):
        load, model, place = _loader(base, reader, blocks)
        # A checkpoint may store experts one by one.
        model._weight_conversions = get_model_conversion_mapping(model)
        stored = {place + inner_name(name): tensor for name, tensor in tensors.items()}
        names = Names(model, stored, str(base))
        trained = {inner_name(name): tensor for name, tensor in names.in_memory(stored).items()}
        if sum(map(torch.numel, trained.values())) < sum(map(torch.numel, stored.values())):
            raise ValueError("it has no weights of such names and shapes")
        plain = _as_in_file(base, old, trained, load)
    back = load({name: (gguf.GGMLQuantizationType.F32, values) for name, values in plain.items()})
    if any(not torch.allclose(back[name], tensor, rtol=1e-6, atol=1e-6) for name, tensor in trained.items()):
        raise InputError(UNTURNED.format(base))
    kind = _kind(dtype, tensors.values())
    written: Stored = {}
    for name, values in plain.items():
        own = old[name].tensor_type
        wanted = own if kind is None or own == gguf.GGMLQuantizationType.F32 else kind
        try:
            written[name] = wanted, gguf.quantize(values, wanted)
        except NotImplementedError:
            raise InputError(
                f"{base} holds {name} as {wanted.name}, which the gguf package cannot write; leave --dtype file out."
            ) from None
    _write(reader, out, written)
    types = {kind.name for kind, _ in written.values()} - {"F32"}
    held = names.on_disk({place + name: value for name, value in load(written).items() if name in trained})
    return {inner_name(name): value for name, value in held.items()}, ", ".join(sorted(types)) or "F32"


def _kind(dtype: str | None, tensors: Any) -> Any:
    """GGUF's type of this name; None: each tensor's own."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if dtype is None:
        small = all(bool(tensor.abs().max() <= torch.finfo(torch.float16).max) for tensor in tensors)
        dtype = "fp16" if small and all(tensor.dtype != torch.bfloat16 for tensor in tensors) else "bf16"
    return {"bf16": kinds.BF16, "fp16": kinds.F16, "fp32": kinds.F32}.get(dtype)


def _as_in_file(
    base: Path,
    old: Mapping[str, Any],
    trained: Mapping[str, torch.Tensor],
    load: Callable[[Stored], dict[str, torch.Tensor]],
) -> dict[str, NDArray[np.float32]]:
    """The trained weights in the names, places and shifts of a GGUF; raises ValueError if they are not its model's."""
    import gguf

    ends = np.cumsum([tensor.n_elements for tensor in old.values()], dtype=np.int64)
    spans = {name: (int(end) - old[name].n_elements, int(end)) for name, end in zip(old, ends, strict=True)}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in old.items()}

    def seen(number: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> dict[str, torch.Tensor]:
        coded = {name: number(np.arange(*span)).reshape(shapes[name]) for name, span in spans.items()}
        kind = gguf.GGMLQuantizationType.F32
        return load({name: (kind, values.astype(np.float32)) for name, values in coded.items()})

    shifts, high, low = seen(np.zeros_like), seen(lambda at: at // _DIGIT), seen(lambda at: at % _DIGIT)
    if missing := trained.keys() - shifts.keys():
        raise ValueError(f"it has no {min(missing)}")
    values = np.full(int(ends[-1]), np.nan, dtype=np.float32)
    for name, tensor in trained.items():
        shift = shifts[name]
        place = (high[name] - shift).long() * _DIGIT + (low[name] - shift).long()
        if not all(bool(part[name].isfinite().all()) for part in (shifts, high, low)):
            raise InputError(UNTURNED.format(base))
        values[place.flatten().numpy()] = (tensor - shift).flatten().numpy()
    found = {name: values[slice(*span)].reshape(shapes[name]) for name, span in spans.items()}
    found = {name: own for name, own in found.items() if not np.isnan(own).all()}
    for name, own in found.items():
        was = gguf.dequantize(old[name].data, old[name].tensor_type)
        if np.isnan(own).any() or (
            own.ndim > 1 and np.linalg.norm(own - was) > _FARTHEST * np.linalg.norm(was)
        ):
            raise ValueError(f"its {name} is of another model")
    return found


def _loader(
    base: Path, reader: Any, blocks: Sequence[int]
) -> tuple[Callable[[Stored], dict[str, torch.Tensor]], PreTrainedModel, str]:
    """A function that gives what transformers makes of tensors that stand in the place of `base`'s, by `inner_name`.

    Beside it the model that it makes them for, without data and other blocks, and what precedes a block's number there.
    """
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    unread = f"transformers cannot read {base} ({WHY}); use the GGUF of a model that it reads."
    with explained(unread, keep=(OSError,)), torch.device("meta"):
        model = built(AutoConfig.from_pretrained(base.parent, gguf_file=base.name))
    # The reader takes a tenth of a second for every module of the model.
    stack_name, stack = find_blocks(model)
    stack._modules = {str(block): stack[block] for block in blocks}

    def load(stored: Stored) -> dict[str, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder, reported(silent, ""), explained(UNTURNED.format(base)):
            path = Path(folder, "blocks.gguf")
            _write(reader, path, stored, alone=True)
            found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        return {inner_name(name): tensor.float() for name, tensor in found.items()}

    return load, model, f"{stack_name}."


def _write(reader: Any, out: Path, stored: Stored, *, alone: bool = False) -> None:
    """Write a GGUF like the one read, its metadata as it stands, with tensors replaced.

    `alone` leaves other tensors out, and the tokenizer, which takes seconds to read.
    """
    tensors = [tensor for tensor in reader.tensors if not alone or tensor.name in stored]
    fields = [(name, field.offset) for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    ends = [*(begin for _, begin in fields[1:]), reader.tensors[0].field.offset]
    kept = [
        reader.data[begin:end].tobytes()
        for (name, begin), end in zip(fields, ends, strict=True)
        if not alone or not name.startswith("tokenizer.")
    ]
    header = bytearray(
        reader.data[:8].tobytes() + struct.pack("<QQ", len(tensors), len(kept)) + b"".join(kept)
    )
    offset = 0
    for tensor in tensors:
        kind, values = stored.get(tensor.name, (tensor.tensor_type, tensor.data))
        name = tensor.name.encode()
        header += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}QIQ", *map(int, tensor.shape), kind, offset)
        offset += -(-values.nbytes // int(reader.alignment)) * int(reader.alignment)
    with out.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            file.write(bytes(-file.tell() % int(reader.alignment)))
            file.write(stored.get(tensor.name, (None, tensor.data))[1].tobytes())
        file.write(bytes(-file.tell() % int(reader.alignment)))
