"""The errors midtune raises on purpose. `cli.py` prints them; nothing else catches them."""

import errno

NO_MEMORY = "memory ran out; make room"
LACKS = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("access is denied", "allow it"),
    errno.EPERM: ("access is denied", "allow it"),
    errno.EIO: ("the disk fails", "mend it"),
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
    """What the machine lacks and what to do, where an error says so: room, leave to write, memory; else None."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if not isinstance(error, OSError) or error.errno not in LACKS:
        return None
    lack, remedy = LACKS[error.errno]
    return f"{lack}{f' ({error.filename})' if error.filename else ''}; {remedy}"
