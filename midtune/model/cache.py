"""midtune's cache of prepared models: each is built once, and seen only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from midtune.errors import InputError

Progress = Callable[[str, "int | None", "int | None"], None]
"""Called with a message, how much is done and how much there is (None: unknown)."""


def cache_folder() -> Path:
    """Where converted models are kept: `$MIDTUNE_CACHE`, else the platform's cache folder."""
    import platformdirs

    chosen = os.environ.get("MIDTUNE_CACHE")
    root = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("midtune"))
    return root / "models"


def build_once(
    target: Path, build: Callable[[Path], Path], *, need_bytes: int, progress: Progress | None = None
) -> Path:
    """`target`, made by `build` if it is not there; seen by others only when it is complete.

    Args:
        target: folder in the cache.
        build: gets an empty work folder beside `target` and returns the finished folder inside it.
        need_bytes: free disk space that `build` takes.
        progress: told when another process is building the same.

    Raises:
        InputError: the cache cannot be written or the disk has no room.
    """
    if is_complete(target):
        return target
    with _sole_builder(target, progress):
        if is_complete(target):
            return target
        require_space(target.parent, need_bytes, f"preparing {target.name}")
        # Whoever holds the lock is the only builder, so a work folder found here is a dead one's.
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


def require_space(folder: Path, need_bytes: int, purpose: str) -> None:
    """Raise InputError unless the disk that holds `folder` has `need_bytes` free."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < need_bytes:
        raise InputError(
            f"{purpose} takes {need_bytes / 2**30:.1f} GiB, but the disk of {existing} has "
            f"{free_bytes / 2**30:.1f} GiB free; make room, or set MIDTUNE_CACHE and HF_HOME to another disk."
        )


def tell(progress: Progress | None, message: str) -> None:
    """Give `progress`, if there is one, a message without a figure."""
    if progress is not None:
        progress(message, None, None)


def is_complete(target: Path) -> bool:
    """Whether a prepared model lies at `target`."""
    return (target / "config.json").is_file() and any(target.glob("*.safetensors"))


@contextmanager
def _sole_builder(target: Path, progress: Progress | None) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(progress, f"waiting for another midtune that is preparing {target.name}")
            lock.acquire()
    except OSError as error:
        raise InputError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}); "
            "set MIDTUNE_CACHE to a folder that can."
        ) from None
    try:
        yield
    finally:
        lock.release()
