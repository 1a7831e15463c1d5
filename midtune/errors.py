"""The errors midtune raises on purpose. `cli.py` prints them; nothing else catches them."""

import errno

LACKS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written to",
    errno.EPERM: "it may not be written to",
    errno.EIO: "the disk fails",
}


class MidtuneError(Exception):
    """A problem a person can act on: one sentence with what was asked, what exists and what to do."""

    exit_code = 2


class InputError(MidtuneError):
    """Something that was asked for is wrong or missing; nothing has been written."""


class RunStopped(MidtuneError):
    """A run stopped itself because it could not go on usefully; its folder stays resumable."""

    exit_code = 3


class Interrupted(MidtuneError):
    """The run was stopped from outside (Ctrl-C, SIGTERM, SIGHUP) after saving a checkpoint."""

    exit_code = 130


def lack_of(error: BaseException) -> str | None:
    """What the machine lacks, of an error that says so: room on a disk, leave to write, memory; else None."""
    if isinstance(error, MemoryError):
        return "memory ran out"
    if not isinstance(error, OSError) or error.errno not in LACKS:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return LACKS[error.errno] + where
