"""The choice of a product, on clocks of the test's making: whichever was faster once is chosen from then on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from midtune.model import products

FASTER = {"packed": 1.0, "unpacked": 2.0}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What has been timed; single rows are faster packed, more rows unpacked."""
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    products._known.cache_clear()
    found: list[str] = []

    def seconds(product: Callable[[], Any], device: torch.device) -> float:
        rows = len(product())
        kind = "unpacked" if found and found[-1] == f"packed {rows}" else "packed"
        found.append(f"{kind} {rows}")
        return FASTER[kind] if rows == 1 else 1 / FASTER[kind]

    monkeypatch.setattr(products, "_seconds", seconds)
    return found


def test_both_are_timed_once_for_a_size(timed: list[str], tmp_path: Path) -> None:
    layer = nn.Linear(4, 6, bias=False)

    def choose(rows: int) -> bool:
        with torch.no_grad():
            return products.unpacked_is_faster(layer, rows, torch.float32)

    assert not choose(1)
    assert choose(7)
    assert timed == ["packed 1", "unpacked 1", "packed 8", "unpacked 8"]
    # Other numbers up to the same power of two, and another process, read what is known.
    assert choose(5)
    products._known.cache_clear()
    assert choose(8)
    assert len(timed) == 4
    kept = json.loads((tmp_path / "products.json").read_text())
    assert [key.partition(", 4 to ")[2] for key in kept] == [
        "6, 1 rows, torch.float32",
        "6, 8 rows, torch.float32",
    ]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_written_anew(timed: list[str], tmp_path: Path, text: str) -> None:
    (tmp_path / "products.json").write_text(text)
    with torch.no_grad():
        assert products.unpacked_is_faster(nn.Linear(4, 6), 2, torch.float32)
    assert len(json.loads((tmp_path / "products.json").read_text())) == 1
