"""The seccomp filter: which system calls a sandboxed program may make.

A program sees a kernel of 2019 (Linux 5.0), without the calls of syscalls.txt. Later calls have the same numbers on
every architecture, and libraries do without them on ENOSYS. So one rule closes io_uring, `clone3` and
whatever newer kernels bring.

Written by hand: a rule is 8 bytes a line, and the packages that make filters are unmaintained (pyseccomp is
of 2021) or need a library that is not everywhere.
"""

from __future__ import annotations

import errno
import platform
import struct
from pathlib import Path

# The first call of Linux 5.1.
_FIRST_LATER = 424
_ROWS = Path(__file__).with_suffix(".txt").read_text().splitlines()
# The calls that it refuses: name: (number on x86_64, number on aarch64).
CLOSED = {
    name: (int(x86_64), int(aarch64))
    for name, x86_64, aarch64 in (row.split() for row in _ROWS if row and not row.startswith("#"))
}
_SOCKET, _SOCKETPAIR, _CLONE = (41, 198), (53, 199), (56, 220)
# AUDIT_ARCH_… of <linux/audit.h>; all of them little-endian.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# AF_UNIX, AF_INET and AF_INET6: harmless, because the program's network is empty.
_FAMILIES = (1, 2, 10)
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
_NEW_NAMESPACE = 0x7E020000

# Classic BPF: load a word, jump, return; offsets into struct seccomp_data.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def program_filter(machine: str | None = None) -> bytes | None:
    """The filter for a `platform.machine()` (default: this one), as `bwrap --seccomp` reads it; None if unknown."""
    known = _ARCHITECTURES.get(machine or platform.machine())
    if known is None:
        return None
    column, architecture = known

    def line(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("<HBBI", code, then, otherwise, value)

    def refuse(error: int) -> bytes:
        return line(_RETURN, _ERROR | error)

    lines = [
        # In a 32-bit program the same numbers are other calls.
        line(_LOAD, _ARCHITECTURE),
        line(_IF_EQUAL, architecture, 1, 0),
        line(_RETURN, _KILL),
        line(_LOAD, _NUMBER),
        # x32 calls too, whose numbers have the second-highest bit set.
        line(_IF_AT_LEAST, _FIRST_LATER, 0, 1),
        refuse(errno.ENOSYS),
    ]
    for numbers in CLOSED.values():
        lines += [line(_IF_EQUAL, numbers[column], 0, 1), refuse(errno.EPERM)]
    lines += [
        line(_IF_EQUAL, _CLONE[column], 0, 4),
        line(_LOAD, _FIRST_ARGUMENT),
        line(_IF_ANY_BIT, _NEW_NAMESPACE, 0, 1),
        refuse(errno.EPERM),
        line(_RETURN, _ALLOW),
        line(_IF_EQUAL, _SOCKET[column], 1, 0),
        line(_IF_EQUAL, _SOCKETPAIR[column], 0, 2 + len(_FAMILIES)),
        line(_LOAD, _FIRST_ARGUMENT),
        *(line(_IF_EQUAL, family, len(_FAMILIES) - place, 0) for place, family in enumerate(_FAMILIES)),
        refuse(errno.EAFNOSUPPORT),
        line(_RETURN, _ALLOW),
    ]
    return b"".join(lines)
