"""Save trained blocks, apply them to a policy, merge them into a checkpoint.

A full patch holds whole blocks under the checkpoint's tensor names and in its dtype, so what is graded is what is
deployed: patch + base equals the merged checkpoint, tensor for tensor. A LoRA patch is PEFT's own adapter folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from midtune.errors import WHY, InputError, explained
from midtune.model.loading import load_policy
from midtune.model.policy import Policy
from midtune.model.sources import Source, checkpoint_files, stored_tensors
from midtune.whole import MANIFEST, damage, require_space, written_whole

TENSORS = "patch.safetensors"
DESCRIPTION = "patch.json"
RESTORE = "train again or restore the file"
# Of a model's folder: its weights, and the card of what is no longer in it.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", "README.md")


@dataclass(frozen=True)
class Patch:
    """Contents of `patch.json`."""

    base_model: str  # as `resolve` takes it
    revision: str | None
    blocks: list[int]
    adapter: str  # `full` or `lora`
    base_digest: str  # sha256 of the base's tensors that the patch replaces
    schema: int = 1


def save_patch(policy: Policy, folder: Path) -> int:
    """Write the trained blocks to `folder`, whole or not at all; returns the bytes written."""
    patch = Patch(
        base_model=policy.source.name,
        revision=policy.source.revision,
        blocks=policy.trained,
        adapter="full" if policy.adapter is None else "lora",
        base_digest=base_digest(policy.source, replaced_names(policy)),
    )
    with written_whole(folder) as scratch:
        if policy.adapter is not None:
            policy.adapter.save_pretrained(scratch)
        else:
            save_file(policy.deployed_blocks(as_stored=True), scratch / TENSORS)
        (scratch / DESCRIPTION).write_text(json.dumps(asdict(patch), indent=1) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in folder.iterdir())


def replaced_names(policy: Policy) -> list[str]:
    """Checkpoint names of all tensors in the trained blocks."""
    return [name for block in policy.trained for name in policy.checkpoint_names(block)]


def base_digest(source: Source, names: Iterable[str]) -> str:
    """sha256 over these tensors of the checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(source.folder, sorted(names)):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_base(source: Source, names: Collection[str], patch: Patch, folder: Path) -> None:
    """Raise InputError unless the patch was trained on this base: its tensors of these names are the same."""
    if set(names) - checkpoint_files(source.folder).keys() or base_digest(source, names) != patch.base_digest:
        raise InputError(
            f"{folder} was trained on other weights of {patch.base_model} than those of {source.name}; "
            "use the base model and revision that patch.json names."
        )


def read_patch(folder: Path) -> Patch:
    """Read `patch.json` and check the folder; raises InputError if the patch is incomplete or damaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{folder} holds no trained patch (no {DESCRIPTION}); finish the run with --resume, or give another run."
        )
    with explained(f"{path} is damaged; {RESTORE}.", keep=(OSError,)):
        patch = Patch(**json.loads(path.read_text(encoding="utf-8")))
    weights = folder / (TENSORS if patch.adapter == "full" else "adapter_model.safetensors")
    if not weights.is_file():
        raise InputError(f"{folder} lacks {weights.name}; {RESTORE}.")
    # Earlier versions wrote no manifest.
    if (folder / MANIFEST).exists() and (wrong := damage(folder)):
        raise InputError(f"{folder} is damaged ({wrong}); {RESTORE}.")
    return patch


def patch_of(target: str) -> Path | None:
    """The patch folder of a run or patch folder, else None; raises InputError for a run without a finished patch."""
    folder = Path(target)
    if (folder / DESCRIPTION).is_file():
        return folder
    if not (folder / "config.yaml").is_file():
        return None
    if not (folder / "patch" / DESCRIPTION).is_file():
        raise InputError(
            f"{target} has no trained patch yet; finish it with `midtune train --resume {target}`."
        )
    return folder / "patch"


def require_patch(target: str) -> Path:
    """The patch folder of a run or patch folder; raises InputError if there is no finished patch."""
    if (folder := patch_of(target)) is None:
        raise InputError(
            f"{target} is neither a run folder nor a patch folder; give a folder that `train` made."
        )
    return folder


def apply_patch(policy: Policy, folder: Path) -> Patch:
    """Load the trained blocks of `folder` into a policy; raises InputError if they were trained on another base."""
    patch = read_patch(folder)
    tensors = tensors_in(folder) if patch.adapter == "full" else {}
    if patch.adapter == "lora":
        from peft import PeftModel

        policy.use_adapter(PeftModel.from_pretrained(policy.model, folder), patch.blocks)
    else:
        _thaw(policy, patch.blocks, tensors)
    check_base(policy.source, replaced_names(policy), patch, folder)
    if patch.adapter == "full":
        with explained(f"{folder / TENSORS} is damaged (no fitting {WHY}); {RESTORE}."):
            policy.load_blocks(tensors)
    return patch


def put_blocks(policy: Policy, blocks: Collection[int], tensors: Mapping[str, torch.Tensor]) -> None:
    """Thaw blocks and set them to tensors under checkpoint names."""
    _thaw(policy, blocks, tensors)
    policy.load_blocks(tensors)


def _thaw(policy: Policy, blocks: Collection[int], tensors: Mapping[str, torch.Tensor]) -> None:
    """Thaw blocks, with their experts if `tensors` hold them."""
    if policy.with_experts:
        names = {name for block in blocks for name in policy.checkpoint_names(block)}
        policy.with_experts = names <= tensors.keys()
    for block in blocks:
        policy.thaw(block)


@contextmanager
def new_model(source: Source, out: Path) -> Iterator[Path]:
    """Yield a scratch folder with the base's files but its weights, which becomes `out` at the end.

    Raises InputError if `out` is not empty or the disk too full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already exists and is not empty; choose another --out.")
    need = sum(file.stat().st_size for file in set(checkpoint_files(source.folder).values()))
    require_space(out, need, "the merged model", "choose another --out")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Programs that load the checkpoint expect only its own files.
    with written_whole(out.absolute(), sealed=False) as scratch:
        for file in sorted(source.folder.iterdir()):
            if file.is_file() and not file.name.endswith(NOT_COPIED):
                shutil.copy(file, scratch / file.name)
        yield scratch
        if out.exists():
            # Unlike rmtree, this refuses if something was put there meanwhile.
            out.rmdir()


def merge_patch(
    source: Source,
    tensors: Mapping[str, torch.Tensor],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Write a complete checkpoint, the base's files with `tensors` replaced; returns the bytes written.

    With `dtype`, all weights are written in it. Keeps one shard in memory at a time; `out` appears when complete, after
    `finish` was called with the folder. Raises InputError if the base is stored in 4-bit, or as `new_model`.
    """
    check_unquantized(source)
    files = checkpoint_files(source.folder)
    with new_model(source, out) as scratch:
        changed = {files[name] for name in tensors} if dtype is None else set(files.values())
        for shard in sorted(set(files.values())):
            if shard not in changed:
                shutil.copy(shard, scratch / shard.name)
                continue
            with safe_open(shard, framework="pt") as opened:
                metadata = opened.metadata() or {"format": "pt"}
                whole = {name: opened.get_tensor(name) for name in opened.keys()}
            for name, was in whole.items():
                whole[name] = tensors.get(name, was).to(dtype or was.dtype)
            save_file(whole, scratch / shard.name, metadata=metadata)
        finish(scratch)
    return sum(file.stat().st_size for file in out.iterdir())


def check_unquantized(source: Source) -> None:
    """Raise InputError if the checkpoint is in 4-bit, whose files cannot take trained blocks."""
    if any(name.endswith(".absmax") for name in checkpoint_files(source.folder)):
        raise InputError(
            f"{source.name} is stored in 4-bit, so whole blocks cannot be put into its files; "
            "train on the unquantized checkpoint to merge."
        )


def deployed_tensors(source: Source, folder: Path) -> dict[str, torch.Tensor]:
    """The trained blocks of a patch, under the checkpoint's names; LoRA is multiplied into the base.

    Raises InputError if the patch is damaged or belongs to another base, or it is LoRA on a base stored in 4-bit.
    """
    patch = read_patch(folder)
    if patch.adapter == "full":
        tensors = tensors_in(folder)
        check_base(source, tensors, patch, folder)
        return tensors
    check_unquantized(source)
    policy = load_policy(source, quantize="none", device="cpu")
    apply_patch(policy, folder)
    return policy.deployed_blocks(as_stored=True)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a patch that is no LoRA; raises InputError if they are damaged."""
    with explained(f"{folder / TENSORS} is damaged ({WHY}); {RESTORE}."):
        return load_file(folder / TENSORS)
