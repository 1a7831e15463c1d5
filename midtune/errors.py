"""The errors midtune raises on purpose, which `cli.py` alone prints; and text of others, safe to show."""

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
MOST_CHARACTERS = 4000
# Stands for a library's reason in what is given to `explained`.
WHY = "‹why›"
# What a terminal obeys instead of showing: escape sequences, controls other than tab and line break, marks that
# turn the direction of text, and surrogates, which cannot be written.
_OBEYED = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return _OBEYED.sub("", text)


def escaped(json_text: str) -> str:
    """The same JSON, with what a terminal would obey written as `\\uXXXX`."""
    return _OBEYED.sub(lambda found: "".join(f"\\u{ord(letter):04x}" for letter in found[0]), json_text)


def bounded(text: str, most: int = MOST_CHARACTERS) -> str:
    """The beginning of a text, and how much of it was left out."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} characters left out)"


def one_line(text: str, most: int = 400) -> str:
    """Text for a message of one line."""
    return bounded(" ".join(text.split()), most)


def reason(error: BaseException) -> str:
    """What an error says, on one line of bounded length; its kind where it says nothing."""
    return one_line(str(error), 200).rstrip(".") or type(error).__name__


class MidtuneError(Exception):
    """A problem a person can act on: one sentence with what was asked, what exists and what to do."""

    exit_code = 2


class InputError(MidtuneError):
    """Something that was asked for is wrong or missing; nothing has been written."""


class RunStopped(MidtuneError):
    """A run stopped itself because continuing makes no sense; its folder can be resumed."""

    exit_code = 3


class Interrupted(MidtuneError):
    """The run was stopped from outside (Ctrl-C, SIGTERM, SIGHUP) after saving a checkpoint."""

    exit_code = 130


@contextmanager
def explained(
    sentence: str, *, keep: tuple[type[Exception], ...] = (), with_kind: bool = False
) -> Iterator[None]:
    """Turn the failure of a library over someone else's file, or of a person's code, into one sentence.

    Args:
        sentence: `WHY` in it becomes the reason.
        keep: errors that pass as they are, beside midtune's own and MemoryError.
        with_kind: put the error's class before the reason.
    """
    kept: tuple[type[Exception], ...] = (MidtuneError, MemoryError, *keep)
    try:
        yield
    except kept:
        raise
    except Exception as error:
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
