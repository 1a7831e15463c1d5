"""Errors midtune raises on purpose, printed only by `cli.py`; and foreign text made safe to show."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

NO_MEMORY = "memory ran out; make room"
LACKS = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("access is denied", "allow it"),
    errno.EPERM: ("access is denied", "allow it"),
    errno.EIO: ("the disk fails", "check it"),
}
# In a sentence for `explained`: replaced by the library's reason.
WHY = "‹why›"
# Characters a terminal obeys or cannot show: escape sequences, controls except tab and line break, marks that change
# text direction, and surrogates.
_OBEYED = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """Remove what a terminal would obey."""
    return _OBEYED.sub("", text)


def escaped(json_text: str) -> str:
    """The same JSON, with what a terminal would obey written as `\\uXXXX`."""
    return _OBEYED.sub(lambda found: "".join(f"\\u{ord(letter):04x}" for letter in found[0]), json_text)


def bounded(text: str, most: int = 4000) -> str:
    """Cut a text to `most` characters, and say how much was left out."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} characters left out)"


def one_line(text: str, most: int = 400) -> str:
    """Text for a one-line message."""
    return bounded(" ".join(text.split()), most)


def reason(error: BaseException) -> str:
    """An error's message on one bounded line; its class if it has none."""
    return one_line(str(error), 200).rstrip(".") or type(error).__name__


class MidtuneError(Exception):
    """A problem the user can act on: one sentence with what was asked, what exists and what to do."""

    exit_code = 2


class InputError(MidtuneError):
    """An input is wrong or missing; nothing has been written."""


class RunStopped(MidtuneError):
    """A run stopped because continuing makes no sense; its folder can be resumed."""

    exit_code = 3


class Interrupted(MidtuneError):
    """The run was stopped from outside (Ctrl-C, SIGTERM, SIGHUP) after saving a checkpoint."""

    exit_code = 130


@contextmanager
def explained(
    sentence: str, *, keep: tuple[type[Exception], ...] = (), with_kind: bool = False
) -> Iterator[None]:
    """Turn a failure in a library reading foreign files, or in a user's code, into an InputError of one sentence.

    `WHY` in the sentence becomes the reason, `with_kind` after the error's class. midtune's own errors, MemoryError and
    those in `keep` pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (MidtuneError, MemoryError, *keep)):
            raise
        why = f"{type(error).__name__}: {error}" if with_kind else reason(error)
        raise InputError(sentence.replace(WHY, why)) from error


def lack_of(error: BaseException) -> str | None:
    """What the machine lacks (room, permission, memory) and what to do, if the error says so; else None."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if not isinstance(error, OSError) or error.errno not in LACKS:
        return None
    lack, remedy = LACKS[error.errno]
    return f"{lack}{f' ({error.filename})' if error.filename else ''}; {remedy}"
