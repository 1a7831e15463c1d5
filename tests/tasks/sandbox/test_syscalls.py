from __future__ import annotations

import errno
import struct

import pytest

from midtune.tasks.sandbox.syscalls import CLOSED, program_filter

ALLOWED, KILLED = "allowed", "killed"
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def verdict(machine: str, number: int, argument: int = 0, architecture: int | None = None) -> str | int:
    """What the kernel would do with a call: it is allowed, ends the process, or fails with an error number."""
    filtered = program_filter(machine)
    assert filtered is not None
    arch = ARCHITECTURES[machine][1] if architecture is None else architecture
    data = struct.pack("<IIQQ", number, arch, 0, argument)
    lines = list(struct.iter_unpack("<HBBI", filtered))
    place, word = 0, 0
    while True:
        code, then, otherwise, value = lines[place]
        if code == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
            place += 1
        elif code == 0x06:
            if value >> 16 == 5:
                return value & 0xFFFF
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}[value]
        else:
            holds = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[code]
            place += 1 + (then if holds else otherwise)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_is_closed(machine: str) -> None:
    column, _ = ARCHITECTURES[machine]
    for name, numbers in CLOSED.items():
        assert verdict(machine, numbers[column]) == errno.EPERM, name
    assert {verdict(machine, number) for number in (424, 425, 435, 450, 0x40000027)} == {errno.ENOSYS}
    assert verdict(machine, 1, architecture=0x40000003) == KILLED


@pytest.mark.parametrize(
    ("machine", "clone", "sockets"), [("x86_64", 56, (41, 53)), ("aarch64", 220, (198, 199))]
)
def test_threads_processes_and_local_sockets_are_left(
    machine: str, clone: int, sockets: tuple[int, int]
) -> None:
    # What glibc's pthread_create and fork ask for.
    assert verdict(machine, clone, 0x3D0F00) == verdict(machine, clone, 0x01200011) == ALLOWED
    assert verdict(machine, clone, 0x10000011) == verdict(machine, clone, 0x00020011) == errno.EPERM
    for call in sockets:
        assert {verdict(machine, call, family) for family in (1, 2, 10)} == {ALLOWED}
        assert {verdict(machine, call, family) for family in (0, 16, 17, 38, 40)} == {errno.EAFNOSUPPORT}


def test_another_machine_has_no_filter() -> None:
    assert program_filter("riscv64") is None
