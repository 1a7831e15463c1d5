"""midtune's cache of prepared models: each is built once, and appears only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.whole import require_space

Progress = Callable[[str, "int | None", "int | None"], None]
"""Called with a message, how much is done and how much there is (None: unknown)."""
OTHER_DISK = "set MIDTUNE_CACHE and HF_HOME to another disk"


def cache_folder(kind: str = "models") -> Path:
    """The folder of converted models, or of another kind: in `$MIDTUNE_CACHE`, else the platform's cache folder."""
    import platformdirs

    chosen = os.environ.get("MIDTUNE_CACHE")
    root = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("midtune"))
    return root / kind


def silent(message: str, done: int | None, total: int | None) -> None:
    """Default progress: show nothing."""


def build_once(
    target: Path, build: Callable[[Path], Path], *, need_bytes: int, progress: Progress = silent
) -> Path:
    """Return `target`, first building it if it is missing; it appears only when complete.

    `build` gets an empty work folder beside `target` and returns the finished folder inside it.
    Raises InputError if the cache cannot be written, or the disk lacks `need_bytes`.
    """
    if is_complete(target):
        return target
    with _sole_builder(target, progress):
        if is_complete(target):
            return target
        require_space(target.parent, need_bytes, f"preparing {target.name}", OTHER_DISK)
        # The lock's holder is the only builder, so a work folder found here was left by a killed one.
        work = target.with_name(f".{target.name}.part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            made = build(work)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(made, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def is_complete(target: Path) -> bool:
    """Whether `target` holds a prepared model."""
    return (target / "config.json").is_file() and any(target.glob("*.safetensors"))


def _sole_builder(target: Path, progress: Progress) -> AbstractContextManager[Any]:
    """Hold the build lock until the context ends."""
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another midtune that is preparing {target.name}", None, None)
            return lock.acquire()
    except OSError as error:
        raise InputError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}); "
            "set MIDTUNE_CACHE to a folder that can."
        ) from None
