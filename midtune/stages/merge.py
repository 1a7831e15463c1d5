"""`midtune merge`: write a run as a complete checkpoint that loads without midtune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midtune.model.patch import deployed_tensors, merge_patch, read_patch, require_patch
from midtune.model.sources import resolve
from midtune.report.formats import numbers_text
from midtune.report.terminal import Terminal


def run(target: Path, *, out: Path, terminal: Terminal) -> dict[str, Any]:
    """Put the trained blocks of a run or patch folder into its base model's checkpoint; `out` appears once complete.

    Returns `folder`, `tensors` (how many were replaced) and `bytes`.
    """
    patch_folder = require_patch(str(target))
    patch = read_patch(patch_folder)
    source = resolve(patch.base_model, patch.revision)
    terminal.message(f"merging blocks {numbers_text(patch.blocks)} into {source.name}")
    tensors = deployed_tensors(source, patch_folder)
    written = merge_patch(source, tensors, out)
    return {"folder": str(out), "tensors": len(tensors), "bytes": written}
