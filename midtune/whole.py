"""Files and folders that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from midtune.errors import InputError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def written_whole(folder: Path, *, sealed: bool = True) -> Iterator[Path]:
    """Yield a scratch folder, which replaces `folder` at the end; raises OSError and changes nothing if writing fails.

    With `sealed`, it gets a manifest that `damage` checks. The parent of `folder` must exist.
    """
    scratch = _temporary(folder)
    made = scratch / folder.name
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        made.mkdir()
        yield made
        _sync(made, sealed)
        if folder.exists():
            folder.rename(scratch / "before")
        made.rename(folder)
        _sync_entry(folder.parent)
    except Exception as error:
        if isinstance(error, OSError) or not _disk_is_full(folder.parent, error):
            raise
        # Each library reports a full disk differently.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that was written whole, such as `a.pt is missing`; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, checksum) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if sha256(file) != checksum:
            return f"{name} does not have its checksum"
    return None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: afterwards it holds all of `content`, or, with an OSError, what it held before.

    Raises InputError if `path` is not a regular file but, for example, a device.
    """
    require_regular(path)
    # Keep a link, and write to its target.
    path = path.resolve()
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_entry(path.parent)
    finally:
        # The folder may be gone or replaced.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_regular(path: Path) -> None:
    """Raise InputError if writing to `path` would replace a folder, a device, a pipe or a socket."""
    if path.exists() and not path.is_file():
        what = "is a folder" if path.is_dir() else "is a device or a pipe"
        raise InputError(f"{path} {what}, and only files are written; choose another name.")


def require_writable(file: Path) -> None:
    """Raise InputError unless a file can be written: regular or new, in a writable folder."""
    require_regular(file)
    parent = file.absolute().parent
    if why := why_not_written(parent):
        raise InputError(f"{file} cannot be written because {parent} {why}; choose another name.")


def why_not_written(folder: Path) -> str | None:
    """Why a folder cannot be written to; None if it can."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "is no folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else "may not be written to"


def require_space(folder: Path, need_bytes: int, what: str, otherwise: str) -> None:
    """Raise InputError unless the disk of `folder`, which need not exist, has `need_bytes` free.

    `what` needs the room, and `otherwise` says what to do without it, both for the message.
    """
    disk = nearest_existing(folder)
    free_bytes = shutil.disk_usage(disk).free
    if free_bytes < need_bytes:
        raise InputError(
            f"{what} needs {need_bytes / 2**30:.2f} GiB of disk space and {free_bytes / 2**30:.2f} GiB are free "
            f"for {disk}; free some, or {otherwise}."
        )


def nearest_existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`; no process may be writing there."""
    for path in [*folder.rglob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(text: str) -> str:
    """Enough of a text's sha256 to detect damage."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(folder: Path, sealed: bool) -> None:
    """Flush a folder's contents and its manifest to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if sealed:
        entries = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in files
        }
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
        files.append(manifest)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    _sync_entry(folder)


def _sync_entry(folder: Path) -> None:
    """Flush a folder's list of names to disk, if the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_is_full(folder: Path, error: Exception) -> bool:
    said = f"os error {errno.ENOSPC}" in str(error) or os.strerror(errno.ENOSPC) in str(error)
    # A disk with less free space than this had no room for what was being written.
    return said or (folder.is_dir() and shutil.disk_usage(folder).free < 2**16)
