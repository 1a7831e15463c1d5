"""`midtune export`: write a run in a form that other programs load, and score it as it will be used.

What a block learns over 4-bit weights makes up for a part of what they lost, so every form is scored beside the base
model in the same form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from midtune.config import RunConfig, with_settings
from midtune.device import DTYPES, compute_dtype, dtype_named, resolve_device
from midtune.errors import InputError
from midtune.model.export import HALF_ROOM, complete, largest_activation, require_finite, save_quantized
from midtune.model.gguf_blocks import inner_name, swap_blocks
from midtune.model.memory import give_back
from midtune.model.patch import (
    Patch,
    deployed_tensors,
    merge_patch,
    new_model,
    put_blocks,
    read_patch,
    require_patch,
    tensors_in,
)
from midtune.model.policy import Policy
from midtune.model.sources import checkpoint_files, hub_id, licence_of
from midtune.report.card import FORMS, model_card
from midtune.report.formats import numbers_text
from midtune.report.page import run_page
from midtune.report.summary import compared
from midtune.report.terminal import Terminal
from midtune.rollout.speech import prompt_ids
from midtune.runs import RunFolder
from midtune.stages.opening import Opened
from midtune.stages.report import read_run
from midtune.whole import require_writable, write_bytes


def run(
    target: Path,
    *,
    out: Path,
    terminal: Terminal,
    to: str = "hf",
    config: RunConfig | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    score: bool = False,
) -> dict[str, Any]:
    """Write the trained blocks of a run or patch folder, within their model, to `out`, which appears once complete.

    Args:
        out: a new folder; for GGUF also a file.
        to: `hf`, `nf4` or `gguf`; see `FORMS`.
        config: the run's; without a task in it nothing is scored.
        base: the GGUF to put the blocks into; default: the one that the run was loaded from.
        dtype: bf16, fp16 or fp32, for GGUF also `file`; default: the checkpoint's own, if the model computes in it;
            for nf4 what the run computed in.

    Returns the form's entry in export.json, and with it `to`, and `forms`, all entries of the run.
    Raises InputError if a choice is wrong or impossible, or the written model does not compute.
    """
    if to not in list(FORMS)[1:]:
        raise InputError(f"there is no form `{to}` to export to; choose hf, nf4 or gguf.")
    known = (*DTYPES, "file") if to == "gguf" else DTYPES
    if dtype is not None and dtype not in known:
        raise InputError(f"dtype {dtype} was asked for, but {to} has {', '.join(known)}; choose one of them.")
    if base is not None and to != "gguf":
        raise InputError(f"--base names a GGUF file, and {to} is made from the base model; leave it out.")
    patch_folder = require_patch(str(target))
    patch = read_patch(patch_folder)
    config = config or RunConfig()
    opened = Opened(
        with_settings(config, {"model.name": patch.base_model, "model.revision": patch.revision}), terminal
    )
    folder = RunFolder(patch_folder.absolute().parent)
    scoring = score and config.task.name is not None
    export = _Export(opened, patch, patch_folder, folder, out, dtype, check=scoring, base=opened)
    what = f"blocks {numbers_text(patch.blocks)} of {patch.base_model}"
    terminal.message(f"writing {what} as {FORMS[to]}")
    entry = getattr(export, to)(*([base] if to == "gguf" else []))
    entry |= {"computes": None, "scores": None}
    if score and not scoring:
        terminal.message("not scored, since this patch lies in no run that names a task")
    if scoring:
        try:
            entry |= export.scored(to)
        except torch.OutOfMemoryError:
            terminal.message(f"written, but not scored: {what} as {FORMS[to]} does not fit into memory here")
    return {"to": to, **entry, "forms": export.describe(to, entry)}


@dataclass
class _Export:
    """One export; `hf`, `nf4` and `gguf` each write a form and return its entry in export.json."""

    opened: Opened
    patch: Patch
    patch_folder: Path
    folder: RunFolder  # may be none
    out: Path
    dtype: str | None
    check: bool
    base: Opened  # what it is compared with
    held: dict[str, torch.Tensor] = field(default_factory=dict)  # the trained weights in a GGUF

    def hf(self) -> dict[str, Any]:
        source = self.opened.source
        tensors = deployed_tensors(source, self.patch_folder)
        stored = next(iter(tensors.values())).dtype
        dtype = dtype_named(self.dtype or "auto") or (self._range() if stored == torch.float16 else None)
        finish = partial(self._finish, dtype=dtype)
        written = merge_patch(source, tensors, self.out, dtype=dtype, finish=finish)
        return self._entry(self.out, written, dtype or stored, len(tensors))

    def nf4(self) -> dict[str, Any]:
        source = self.opened.source
        tensors = deployed_tensors(source, self.patch_folder)
        dtype = dtype_named(self.dtype or "auto") or self._run_dtype()
        policy = self.opened.policy(quantize="nf4")
        if policy.model.config.get_text_config() is not policy.model.config:
            raise InputError(
                f"{source.name} also sees, and only its text part was loaded, so no whole 4-bit model can be written; "
                "use --to hf."
            )
        put_blocks(policy, self.patch.blocks, tensors)
        with new_model(source, self.out) as scratch:
            save_quantized(policy, scratch, dtype)
            del policy
            give_back()
            self._finish(scratch, dtype)
        written = sum(file.stat().st_size for file in self.out.iterdir())
        return self._entry(self.out, written, dtype, len(tensors))

    def gguf(self, base: Path | None) -> dict[str, Any]:
        name = self.patch.base_model
        if base is None and not name.endswith(".gguf"):
            raise InputError(
                f"{name} is no GGUF file, and the blocks go into one; name any GGUF of that model with --base."
            )
        # Whole blocks need nothing of the base but the file they go into.
        whole = self.patch.adapter == "full"
        tensors = (
            tensors_in(self.patch_folder)
            if whole
            else deployed_tensors(self.opened.source, self.patch_folder)
        )
        base = base or Path(name)
        file = self.out
        if file.suffix != ".gguf":
            file.mkdir(parents=True, exist_ok=True)
            file = file / f"{base.stem}-midtune.gguf"
        if file.exists():
            raise InputError(f"{file} already exists; choose another --out.")
        require_writable(file)
        self.base = Opened(with_settings(self.opened.config, _model(base)), self.opened.terminal)
        part = file.with_name(f".{file.name}.tmp")
        try:
            self.held, kind = swap_blocks(base, tensors, self.patch.blocks, part, self.dtype)
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)
        return self._entry(file, file.stat().st_size, kind, len(tensors))

    def scored(self, to: str) -> dict[str, Any]:
        """Greedy scores on the run's held-out problems: of the base in this form, and of what was written."""
        quantize = "nf4" if to == "nf4" else "none"
        policy = self.base.policy(quantize=quantize)
        before = self._score(policy, "the base")
        if to == "gguf":
            names = checkpoint_files(policy.source.folder)
            held = {name: self.held[key] for name in names if (key := inner_name(name)) in self.held}
            put_blocks(policy, self.patch.blocks, held)
        else:
            del policy
            give_back()
            written = Opened(with_settings(self.opened.config, _model(self.out)), self.opened.terminal)
            policy = written.policy(quantize=quantize)
        after = self._score(policy, "the export")
        return {"computes": policy.computes, "scores": compared((before, after))}

    def describe(self, to: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Write export.json, the report's page and the model card; returns all forms of the run."""
        folder, report = self.folder, {}
        forms = {to: entry}
        if folder.config.is_file():
            if folder.exports.is_file():
                forms = {**folder.read_json(folder.exports)["forms"], **forms}
            folder.write_json(folder.exports, {"schema": 1, "forms": forms})
            if folder.report.is_file():
                found = read_run(folder)
                report = dict(found.report)
                folder.write_text(folder.page, run_page(found))
        if self.out.suffix != ".gguf":
            base, name = self.patch.base_model, Path(entry["path"]).name
            licence = licence_of(
                self.base.config.model.name, None if to == "gguf" else self.opened.source.folder
            )
            card = model_card(report, to, name, exports=forms, base=hub_id(base), licence=licence)
            write_bytes(self.out / "README.md", card.encode())
        return forms

    def _finish(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Complete a folder before it appears, and sample from it if it will be scored."""
        complete(folder, self.opened.source, self.opened.tokenizer, dtype)
        if self.check:
            require_finite(folder, self._prompt(), resolve_device(self.opened.config.model.device))

    def _entry(self, path: Path, written: int, dtype: Any, tensors: int) -> dict[str, Any]:
        named = str(dtype).removeprefix("torch.")
        return {"path": str(path), "bytes": written, "dtype": named, "tensors": tensors}

    def _score(self, policy: Policy, what: str) -> NDArray[Any]:
        return self.opened.score(self.opened.sampler(policy), f"scoring {what}", samples=0).greedy

    def _prompt(self) -> list[int]:
        return prompt_ids(self.opened.tokenizer, [{"role": "user", "content": "What is 1 + 1?"}])

    def _range(self) -> torch.dtype | None:
        """bf16 where activations may leave the range of fp16, in which the checkpoint is stored."""
        policy = self.opened.policy(quantize="nf4")
        largest = largest_activation(policy, self._prompt())
        del policy
        give_back()
        if largest < HALF_ROOM:
            return None
        self.opened.terminal.message(
            f"activations reach {largest:.2g}, too much for float16: writing bfloat16"
        )
        return torch.bfloat16

    def _run_dtype(self) -> torch.dtype:
        """What the run computed in, or would here."""
        if self.folder.environment.is_file():
            named = str(self.folder.read_json(self.folder.environment)["device"]).rpartition(" ")[2]
            if isinstance(found := getattr(torch, named, None), torch.dtype):
                return found
        model = self.opened.config.model
        return compute_dtype(model.dtype, resolve_device(model.device))


def _model(path: Path) -> dict[str, Any]:
    return {"model.name": str(path), "model.revision": None, "model.rounding": "nearest"}
