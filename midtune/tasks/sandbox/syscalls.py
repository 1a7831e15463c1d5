"""The seccomp filter: which system calls a sandboxed program may make.

A program sees a kernel of 2019 (Linux 5.0), without the calls below. Later calls have the same numbers on
every architecture, and libraries do without them on ENOSYS. So one rule closes io_uring, `clone3` and
whatever newer kernels bring.

Written by hand: a rule is 8 bytes a line, and the packages that make filters are unmaintained (pyseccomp is
of 2021) or need a library that is not everywhere.
"""

from __future__ import annotations

import errno
import platform
import struct

# The first call of Linux 5.1.
_FIRST_LATER = 424
# Calls that hold memory no process limit counts, or that reach beyond the namespaces:
# name: (number on x86_64, number on aarch64), from <asm/unistd.h>.
CLOSED = {
    # System V and POSIX queues, and memory outside of any address space.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "memfd_create": (319, 279),
    "io_setup": (206, 0),
    "remap_file_pages": (216, 234),
    "vmsplice": (278, 75),
    # Keys.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # Other processes, and the kernel itself.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "personality": (135, 92),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    # Each program keeps to the CPU that it is given.
    "sched_setaffinity": (203, 122),
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
