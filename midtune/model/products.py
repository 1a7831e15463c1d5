"""Which product of 4-bit layers is faster on a card: bitsandbytes' own, or one with unpacked weights.

bitsandbytes has a fused product for few rows, and how few depends on the card and the layer. So both are timed once,
and the times are kept on disk for every later run.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from midtune.model.cache import cache_folder
from midtune.whole import write_bytes

WARM, TIMED = 3, 20


def unpacked_is_faster(layer: nn.Linear, rows: int, dtype: torch.dtype) -> bool:
    """Whether a product with the layer's unpacked weights takes less time than the layer's own, for `rows` rows."""
    device, inputs, outputs = layer.weight.device, layer.in_features, layer.out_features
    # A power of two, so that few sizes are timed.
    rows = 1 << max(rows - 1, 0).bit_length()
    key = f"{_versions(device)}, {inputs} to {outputs}, {rows} rows, {dtype}"
    known = _known(_file())
    if key not in known:
        # Drawn numbers would change what a run draws.
        given = torch.ones(rows, inputs, dtype=dtype, device=device)
        weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
        known[key] = [
            _seconds(lambda: layer(given), device),
            _seconds(lambda: F.linear(given, weight), device),
        ]
        # Without a cache they are timed in every run.
        with contextlib.suppress(OSError):
            _file().parent.mkdir(parents=True, exist_ok=True)
            write_bytes(_file(), json.dumps(known, indent=1).encode())
    packed, unpacked = known[key]
    return unpacked < packed


def _file() -> Path:
    return cache_folder().parent / "products.json"


@cache
def _known(file: Path) -> dict[str, list[float]]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        if isinstance(found, dict):
            return found
    return {}


@cache
def _versions(device: torch.device) -> str:
    card, kernels = torch.cuda.get_device_name(device), version("bitsandbytes")
    return f"{card}, torch {torch.__version__}, bitsandbytes {kernels}"


def _seconds(product: Callable[[], Any], device: torch.device) -> float:
    for _ in range(WARM):
        product()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(TIMED):
        product()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / TIMED
