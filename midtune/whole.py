"""Files and folders that are whole or not there: written beside their place, then renamed into it."""

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
# A disk with less than this left could not take what was being written.
FULL_BYTES = 2**16


@contextlib.contextmanager
def written_whole(folder: Path, *, sealed: bool = True) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` at the end; removed if writing fails.

    Args:
        folder: its parent exists.
        sealed: leave a manifest in it, with which `damage` can check it.

    Raises:
        OSError: it could not be written; what was at `folder` before is still there.
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
        # Each library reports a full disk in its own way.
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
    """Put `content` into a file: afterwards it holds all of it, or what it held before.

    Raises:
        InputError: `path` is something else than a regular file, such as a device.
        OSError: it could not be written.
    """
    require_regular(path)
    # A link stays, and what it points to is written.
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
        # The folder may be gone, or no folder any more.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_regular(path: Path) -> None:
    """Check that a file can be written at `path` without replacing anything but a file.

    Raises:
        InputError: it is a folder, a device, a pipe or a socket.
    """
    if path.exists() and not path.is_file():
        what = "is a folder" if path.is_dir() else "is a device or a pipe"
        raise InputError(f"{path} {what}, and only files are written; choose another name.")


def require_writable(file: Path) -> None:
    """Check that a file can be written.

    Raises:
        InputError: it is no regular file, or its folder is missing or may not be written to.
    """
    require_regular(file)
    parent = file.absolute().parent
    if why := why_not_written(parent):
        raise InputError(f"{file} cannot be written because {parent} {why}; choose another name.")


def why_not_written(folder: Path) -> str | None:
    """Why nothing can be written to a folder; None if something can."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "is no folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else "may not be written to"


def require_space(folder: Path, need_bytes: int, what: str, otherwise: str) -> None:
    """Check that a disk has room.

    Args:
        folder: on that disk; it need not exist.
        what: needs the room, for the message.
        otherwise: what to do where none can be made, for the message.

    Raises:
        InputError: `need_bytes` are not free.
    """
    disk = nearest_existing(folder)
    free_bytes = shutil.disk_usage(disk).free
    if free_bytes < need_bytes:
        raise InputError(
            f"{what} needs {need_bytes / 2**30:.2f} GiB of disk space and {free_bytes / 2**30:.2f} GiB are free "
            f"for {disk}; free some, or {otherwise}."
        )


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`; nobody may be writing there now."""
    for path in [*folder.rglob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(text: str) -> str:
    """Enough of a text's sha256 to tell that it was damaged."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(folder: Path, sealed: bool) -> None:
    """Have the disk hold all that is in a folder, and its manifest."""
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
    """Have the disk hold the names in a folder, where the system can be asked for it."""
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
    return said or (folder.is_dir() and shutil.disk_usage(folder).free < FULL_BYTES)
