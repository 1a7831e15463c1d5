"""Programs that mean harm: what each tries, and that it comes to nothing within its limits.

A program prints `got through` where it did what it tried. Those that use up their time are slow; run
`pytest -m slow -s tests/tasks/sandbox/test_hostile.py` for the table of what every program took.
"""

# ruff: noqa: E501 (programs are literals)
from __future__ import annotations

import json
import platform
import threading
import time
from dataclasses import dataclass, field

import psutil
import pytest

from midtune.config import SandboxConfig
from midtune.tasks.code import call_tests, fraction_passed
from midtune.tasks.sandbox.sandbox import Sandbox
from midtune.tasks.sandbox.syscalls import CLOSED

LIMITS = SandboxConfig(cpu_s=1, wall_s=3.0, memory_mib=128, processes=4)
MIB = 2**20
COLUMN = 1 if platform.machine() == "aarch64" else 0
LATER = {"io_uring_setup": 425, "open_tree": 428, "pidfd_open": 434, "clone3": 435, "memfd_secret": 447}
NUMBERS = {name: numbers[COLUMN] for name, numbers in CLOSED.items()} | LATER
CALLS = (
    "import ctypes\n"
    "libc = ctypes.CDLL(None)\n"
    f"numbers = {NUMBERS}\n"
    "def call(name, *args):\n"
    "    if libc.syscall(numbers[name], *args) >= 0: print('got through', name)\n"
)
TRY = "def attempt(do, *args):\n    try: do(*args); print('got through')\n    except (OSError, ValueError, MemoryError): pass\n"
MANY = "import os\nn = 0\ntry:\n    while True:\n        {make}\n        n += 1\n        if n > 200_000: print('got through'); break\nexcept OSError: pass\n"

# What each tries, and the program.
QUICK = {
    "System V memory": CALLS + "call('shmget', 0, 1 << 30, 0o1600)",
    "System V semaphores": CALLS + "call('semget', 0, 1000, 0o1600)",
    "System V queues": CALLS + "call('msgget', 0, 0o1600)",
    "POSIX queues": CALLS + "call('mq_open', b'x', 66, 0o600, 0)",
    "memory by memfd": CALLS + "call('memfd_create', b'x', 0)",
    "secret memory": CALLS + "call('memfd_secret', 0)",
    "memory in /dev/shm": TRY + "attempt(open, '/dev/shm/x', 'w')",
    "keys of the kernel": CALLS
    + "call('add_key', b'user', b'a', b'b', 1, -3); call('keyctl', 0, -3, 1); call('request_key', b'user', b'a', 0, -3)",
    "io_uring": CALLS + "p = ctypes.create_string_buffer(120)\ncall('io_uring_setup', 8, p)",
    "asynchronous IO": CALLS + "p = ctypes.c_ulong()\ncall('io_setup', 60000, ctypes.byref(p))",
    "userfaultfd": CALLS + "call('userfaultfd', 1)",
    "a user namespace by unshare": CALLS + "call('unshare', 0x10000000)",
    "a user namespace by clone": "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    f"pid = libc.syscall({(56, 220)[COLUMN]}, 0x10000000 | 17, 0, 0, 0, 0)\n"
    "if pid >= 0: print('got through', flush=True)\nif pid == 0: os._exit(0)",
    "a user namespace by clone3": CALLS
    + "a = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17)\ncall('clone3', a, 64)",
    "another namespace by setns": CALLS + "call('setns', 0, 0)",
    "a mount": CALLS
    + "call('mount', b'x', b'/tmp', b'tmpfs', 0, 0); call('open_tree', -100, b'/', 1); call('umount2', b'/tmp', 2)",
    "a root of its own": CALLS + "call('chroot', b'/tmp'); call('pivot_root', b'/tmp', b'/tmp')",
    "tracing its parent": CALLS
    + "import os\ncall('ptrace', 16, os.getppid(), 0, 0); call('ptrace', 0, 0, 0, 0)",
    "memory of its parent": CALLS + "import os\ncall('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)",
    "counters of the CPU": CALLS
    + "a = ctypes.create_string_buffer(128)\na[4] = 112\ncall('perf_event_open', a, 0, -1, -1, 0)",
    "a program in the kernel": CALLS + "a = ctypes.create_string_buffer(128)\ncall('bpf', 0, a, 128)",
    "a kernel module, another kernel": CALLS
    + "call('init_module', b'', 0, b''); call('kexec_load', 0, 0, 0, 0); call('reboot', 0, 0, 0, 0)",
    "messages of the kernel": CALLS + "call('syslog', 10, 0, 0)",
    "other CPUs": TRY + "import os\nattempt(os.sched_setaffinity, 0, range(64))",
    "calls of another architecture": "import ctypes\n"
    "if ctypes.CDLL(None).syscall(0x40000000 + 39) >= 0: print('got through')",
    "sockets beyond its network": TRY
    + "import socket\nfor family, kind in ((40, 1), (16, 3), (38, 5), (17, 3), (30, 1), (31, 1), (44, 3)):\n"
    "    attempt(socket.socket, family, kind)",
    "the network": TRY
    + "import socket\nfor host in ('127.0.0.1', '192.0.2.1', '::1'): attempt(socket.create_connection, (host, 80), 1)",
    "files of the host": TRY
    + "for path in ('/etc/passwd', '/proc/1/environ', '/proc/self/mem', '/root', '/home', '/sys', '/dev/mem', '/dev/sda', '/dev/kmsg'):\n"
    "    attempt(open, path)",
    "a device node": TRY
    + "import os, stat\nattempt(os.mknod, '/tmp/d', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
    "to be root": TRY + "import os\nfor do in (os.setuid, os.seteuid, os.setgid): attempt(do, 0)",
    "higher limits": TRY
    + "import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_FSIZE):\n"
    "    attempt(r.setrlimit, n, (2**40, 2**40))",
    "to kill all": "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass",
    "verdicts on every open file": "import os\nfor fd in range(3, 32):\n"
    "    try: os.write(fd, b'1' * 100 + b'(True,1,)\\n')\n    except OSError: pass",
    "more open files": TRY + "attempt(lambda: [open('/dev/null') for _ in range(64)])",
    "memory in pipes": TRY
    + "import fcntl, os\ndef fill():\n    for _ in range(64):\n        r, w = os.pipe(); fcntl.fcntl(w, 1031, 2**20); os.set_blocking(w, False); os.write(w, bytes(2**20))\nattempt(fill)",
    "memory in sockets": TRY
    + "import socket\ndef fill():\n    kept = []\n    for _ in range(64):\n        kept += (pair := socket.socketpair()); pair[0].setblocking(False); pair[0].send(bytes(2**20))\nattempt(fill)",
    "more memory than its limit": TRY + "attempt(lambda: [bytearray(2**20) for _ in range(128)])",
    "shared memory beyond its limit": TRY
    + "import mmap\nattempt(lambda: [mmap.mmap(-1, 2**24) for _ in range(8)])",
    "a file beyond its limit": "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    + TRY
    + "def fill():\n    with open('/tmp/x', 'wb') as f: f.write(bytes(2**23))\nattempt(fill)",
    "more than /tmp holds": TRY
    + "def fill():\n    for n in range(20):\n        with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(2**20))\nattempt(fill)",
    "empty files without end": MANY.format(make="os.mknod(f'/tmp/{n}')"),
    "folders without end": MANY.format(make="os.mkdir(f'/tmp/{n}')"),
    "links without end": MANY.format(make="os.symlink('x' * 400, f'/tmp/{n}')"),
    "output without end": "while True: print('x' * 10_000)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a source that nests": "x = " + "(" * 5000 + "1" + ")" * 5000,
}
LONG = {
    "a stack without end": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f() + 1\nf()",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a fork bomb of short lives": "import os\nos.fork(); os.fork()\nwhile True:\n    try:\n"
    "        if os.fork() == 0: os._exit(0)\n        os.wait()\n    except OSError: pass",
    "a thread bomb": "import threading\ndef f():\n    while True:\n        try: threading.Thread(target=f).start()\n"
    "        except RuntimeError: pass\nf()",
    "children in other sessions": "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: pass",
    "an endless loop": "while True: pass",
    "a loop that ignores its limit": "import signal\nfor n in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "sleep": "import time\ntime.sleep(600)",
    "to stop itself": "import os\nos.kill(os.getpid(), 19)",
    "a power without end": "len(str(9 ** 9 ** 9))",
    "a pattern without end": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "memory in every process": "import os, time\nos.fork(); os.fork()\nkept = []\nwhile True:\n"
    "    try: kept.append(bytearray(2**20))\n    except MemoryError: time.sleep(1)",
    "errors without end": "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    "files in every process": "import os\nos.fork(); os.fork()\nn = 0\nwhile True:\n    n += 1\n"
    "    try: os.mknod(f'/tmp/{os.getpid()}-{n}')\n    except OSError: pass",
    "file locks without end": "import fcntl\nf = open('/tmp/x', 'w')\nn = 0\nwhile True:\n    n += 2\n    fcntl.lockf(f, fcntl.LOCK_EX, 1, n)",
}
BOMBS = ("a fork bomb", "a fork bomb of short lives", "a thread bomb", "children in other sessions")


@dataclass
class Used:
    """What the processes below this one take while the block runs, and what the kernel keeps for them."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    resident_bytes: int = 0
    shared_bytes: int = 0
    kernel_bytes: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Used:
        self._began, self._start = time.monotonic(), _kernel()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.monotonic() - self._began
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        spent: dict[int, float] = {}
        me = psutil.Process()
        while not self._over.wait(0.01):
            resident = 0
            for process in me.children(recursive=True):
                try:
                    resident += process.memory_info().rss
                    times = process.cpu_times()
                    spent[process.pid] = times.user + times.system
                except psutil.Error:
                    continue
            shared, kernel = _kernel()
            self.cpu_s = sum(spent.values())
            self.resident_bytes = max(self.resident_bytes, resident)
            self.shared_bytes = max(self.shared_bytes, shared - self._start[0])
            self.kernel_bytes = max(self.kernel_bytes, kernel - self._start[1])


def _kernel() -> tuple[int, int]:
    with open("/proc/meminfo") as file:
        said = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    return said["Shmem"], said["Slab"] + said["KernelStack"] + said["PageTables"]


@pytest.fixture(scope="module")
def hostile(isolated: Sandbox) -> Sandbox:
    return Sandbox(LIMITS, isolated.isolation, workers=2)


@pytest.mark.parametrize("source", QUICK.values(), ids=QUICK)
def test_it_does_not_get_through(hostile: Sandbox, source: str) -> None:
    before = psutil.Process().children(recursive=True)
    started = time.monotonic()
    result = hostile.run(source)
    assert b"got through" not in result.output
    assert result.broken == ""
    assert time.monotonic() - started < LIMITS.wall_s + 1
    assert psutil.Process().children(recursive=True) == before


def test_files_without_end_are_ended_soon(hostile: Sandbox) -> None:
    result = hostile.run(QUICK["empty files without end"] + "\nprint('went on')")
    assert (result.killed, result.output) == (True, b"")
    many = (
        "import os\nfor n in range(2000): os.mknod(f'/tmp/{n}')\nimport time; time.sleep(0.2); print('well')"
    )
    assert hostile.run(many).output == b"well\n"


def test_files_are_counted_where_functions_are_called(hostile: Sandbox) -> None:
    program = "import os\ndef f():\n    n = 0\n    while True: n += 1; os.mknod(f'/tmp/{n}')"
    started = time.monotonic()
    tests = json.dumps(call_tests([], ["try: f()\nexcept ConnectionError: pass", "assert f() == 1"]))
    assert fraction_passed(hostile, program, tests) == 0
    assert time.monotonic() - started < 1


def test_the_programs_of_a_job_stay_on_one_cpu(hostile: Sandbox) -> None:
    source = "import os\nprint(len(os.sched_getaffinity(0)))\nos.sched_setaffinity(0, range(64))"
    found = hostile.each(hostile.run, [source] * 3)
    assert [(result.output, result.exit_code) for result in found] == [(b"1\n", 1)] * 3


@pytest.mark.slow
def test_what_every_program_takes(hostile: Sandbox) -> None:
    tests = json.dumps(call_tests([], ["assert f(1) == 'a word that nobody knows'"]))
    print(f"\n{len(QUICK) + len(LONG)} programs\n")
    print("| tries | ends by | CPU s | wall s | resident MiB | shared MiB | kernel MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, source in {**QUICK, **LONG}.items():
        with Used() as used:
            result = hostile.run(source)
        assert b"got through" not in result.output, name
        assert result.broken == "", name
        assert used.wall_s < LIMITS.wall_s + 1, name
        assert used.cpu_s < LIMITS.wall_s * 2, name
        assert used.resident_bytes < (LIMITS.processes + 1) * LIMITS.memory_mib * MIB, name
        # What /tmp holds, and room for what the machine does besides.
        assert used.shared_bytes < 64 * MIB, name
        assert used.kernel_bytes < 256 * MIB, name
        assert fraction_passed(hostile, source, tests) == 0, name
        how = "its time or files" if result.killed else f"exit code {result.exit_code}"
        sizes = (used.resident_bytes, used.shared_bytes, used.kernel_bytes)
        memory = " | ".join(f"{max(size, 0) / MIB:.0f}" for size in sizes)
        print(f"| {name} | {how} | {used.cpu_s:.2f} | {used.wall_s:.2f} | {memory} |")
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.slow
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="a neighbour needs a CPU of its own")
def test_neighbours_of_a_bomb_do_not_wait(isolated: Sandbox) -> None:
    limits = SandboxConfig(cpu_s=3, wall_s=5.0, memory_mib=128, processes=4)
    sandbox = Sandbox(limits, isolated.isolation, workers=2)
    work = "n = 0\nfor i in range(4_000_000): n += i\nprint(n)"

    def neighbour_s(bomb: str) -> float:
        def timed(source: str) -> float:
            started = time.monotonic()
            result = sandbox.run(source)
            took = time.monotonic() - started
            assert source == bomb or result.exit_code == 0
            return took

        return min(sandbox.each(timed, [bomb, *[work] * 5])[1:])

    print("\n| beside | a neighbour takes |\n|---|---|")
    took_s = {}
    for name in ("sleep", "an endless loop", *BOMBS):
        took_s[name] = neighbour_s(LONG[name])
        print(f"| {name} | {took_s[name]:.2f} s |")
    # As beside a program that is merely wrong; other work on this machine is the same for both.
    assert max(took_s[name] for name in BOMBS) < 2 * took_s["an endless loop"]
