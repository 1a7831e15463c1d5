"""Run untrusted programs: isolated, within limits, with no processes left behind.

With bubblewrap (https://github.com/containers/bubblewrap) a program has its own process, network, IPC, host
name and mount namespaces. It sees the standard library and the shared libraries, read-only, and an empty
`/tmp` in memory: no other file or process, no network, no `/proc`. A user's programs also get a user
namespace that forbids further ones. Each of root's programs gets a user id of its own, because the kernel does
not count root's processes. A filter closes system calls that reach further (`syscalls.py`; x86_64 and aarch64).
The kernel limits CPU time, address space, processes, open files, file size and output; midtune limits wall time
and the number of files. When a program ends, so do all processes of its namespace. The programs of a job stay on
one CPU (`Sandbox.each`), so one that takes all it can get does not slow those on other CPUs.

Not guaranteed: a hole in the kernel is a way out. Memory and CPU limits hold per process, so they multiply by
`processes`. Files are counted every 50 ms, so a program can make some ten thousand, 1 KiB each, before it is killed.

Without bubblewrap isolation is *weak*: the same limits, an empty environment and an empty start folder, but
the program can read and write what its user can, use the network, and leave processes behind. There is
nothing in between: landlock is a development release that leaves processes alone; sandlock needs Linux 6.7.
"""

from __future__ import annotations

import itertools
import marshal
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from midtune.config import SandboxConfig
from midtune.errors import InputError, RunStopped
from midtune.tasks.sandbox import inside
from midtune.tasks.sandbox.syscalls import program_filter

_OUTPUT_BYTES = 4 * 2**20
# Files in /tmp, and how often they are counted: bubblewrap sets no limit on them.
_FILES, _COUNT_EVERY_S = 4096, 0.05
# User ids that systemd keeps for services without a user; no person and no file has one. Taken in turn from a
# random start: the kernel would count two programs with one id together.
_FIRST_PASSING_UID, _PASSING_UIDS = 61184, 4336
_uids = itertools.count(secrets.randbelow(_PASSING_UIDS))
_SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
# A fixed hash seed keeps sets in order, so that a resumed run gives the same rewards.
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}
# No site-packages, nothing from the folder, no caches to write.
_INTERPRETER = (os.path.realpath(sys.executable), "-S", "-s", "-P", "-B")
_Job = TypeVar("_Job")
_Found = TypeVar("_Found")
_BOOT = """\
import marshal, os, sys
with os.fdopen(int(sys.argv[1]), "rb") as file:
    code, job = marshal.load(file)
space = {"__name__": "inside"}
exec(code, space)
space["main"](job)
"""


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    output: bytes  # the first 4 MiB of standard output
    exit_code: int  # 0: success
    broken: str  # the sandbox's message if it never started the program; else empty

    @property
    def killed(self) -> bool:
        """Whether it was killed from outside, as at a timeout."""
        # bubblewrap reports signals as shells do.
        return self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass(eq=False)
class Running:
    """A program in its sandbox."""

    _process: subprocess.Popen[bytes]
    _output: int  # file descriptor of standard output
    _socket: socket.socket  # messages of `inside.py`
    _deadline: float
    _files: ExitStack
    _isolated: bool
    _said: bytes = b""
    _folder: int | None = None

    def wait(self, most_s: float | None = None, *, beside: Sequence[Running] = ()) -> Result:
        """Run to the end, the deadline or `most_s`, then kill; too many files kill it, or one `beside` it, early."""
        deadline = self._deadline if most_s is None else time.monotonic() + most_s
        ended = False
        while self._process.returncode is None and not ended:
            left_s = max(deadline - time.monotonic(), 0.0)
            # This does not reap it: `_end` needs its id.
            with os.fdopen(os.pidfd_open(self._process.pid)) as handle:
                ended = bool(connection.wait([handle.fileno()], min(left_s, _COUNT_EVERY_S)))
            for running in (self, *beside):
                if running._has_many_files():
                    running._end()
            if left_s == 0:
                break
        self._end()
        self._listen()
        broken = ended and not self._said.endswith(inside.STARTED)
        why = self._said.decode(errors="replace").strip().rpartition("\n")[2] or "it said nothing"
        output = os.pread(self._output, _OUTPUT_BYTES, 0)
        return Result(output, self._process.returncode, why if broken else "")

    def _has_many_files(self) -> bool:
        if self._folder is None:
            self._listen()
        if self._folder is None or not self._isolated or self._process.returncode is not None:
            return False
        counted = os.fstatvfs(self._folder)
        return counted.f_files - counted.f_ffree > _FILES

    def _listen(self) -> None:
        """Read new messages, and the folder's descriptor that comes with the start message."""
        while True:
            try:
                said, fds, _, _ = socket.recv_fds(self._socket, 2**16, 1, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, ConnectionResetError):
                return
            for fd in fds:
                self._files.callback(os.close, fd)
                self._folder = fd
            if not said:
                return
            self._said += said

    def _end(self) -> None:
        # Until it is reaped no other process can have its id. The group is bubblewrap, whose end ends its
        # namespace, or what a weakly isolated program started.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@dataclass(frozen=True)
class Sandbox:
    """Starts programs within limits."""

    limits: SandboxConfig
    isolation: tuple[str, ...]  # command that starts a program; empty: weak isolation
    workers: int = 1  # programs to run at a time

    @property
    def warning(self) -> str | None:
        """What to tell a person before programs run here."""
        if self.isolation:
            return None
        return (
            "programs that the model writes run with weak isolation: they can read and write what you can, and use "
            "the network."
        )

    @contextmanager
    def start(
        self, role: str, *, stdin: bytes = b"", fds: Mapping[str, int] | None = None, **job: Any
    ) -> Iterator[Running]:
        """Start a role of `inside.py` with its `job` and file descriptors by name; leaving ends all its processes."""
        fds = fds or {}
        uid = _FIRST_PASSING_UID + next(_uids) % _PASSING_UIDS if os.geteuid() == 0 else None
        job |= {**fds, "role": role, "limits": kernel_limits(self.limits), "uid": uid}
        with ExitStack() as files:
            folder = "/tmp"
            if not self.isolation:
                folder = files.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                os.chmod(folder, 0o777)

            def holding(content: bytes) -> int:
                """Use a file, not a pipe: nobody has to drain it, and the kernel's file limit also limits output."""
                file = files.enter_context(tempfile.TemporaryFile())
                file.write(content)
                file.seek(0)
                return file.fileno()

            handed = holding(marshal.dumps((_code(), job)))
            output = holding(b"")
            isolation = self.isolation
            passed = [handed, *fds.values()]
            if isolation and (calls := program_filter()) is not None:
                passed.append(holding(calls))
                isolation = (isolation[0], "--seccomp", str(passed[-1]), *isolation[1:])
            said, its_end = (files.enter_context(end) for end in socket.socketpair())
            said.setblocking(False)
            with its_end:
                process = subprocess.Popen(
                    [*isolation, *_INTERPRETER, "-c", _BOOT, str(handed)],
                    stdin=holding(stdin),
                    stdout=output,
                    stderr=its_end.fileno(),
                    env={**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                    cwd=folder,
                    pass_fds=passed,
                    start_new_session=True,
                )
            deadline = time.monotonic() + self.limits.wall_s
            running = Running(process, output, said, deadline, files, bool(self.isolation))
            files.callback(running._end)
            yield running

    def run(self, source: str, stdin: bytes = b"") -> Result:
        """Run a program to its end; raise RunStopped if the sandbox no longer works."""
        with self.start("run", sources=[source], stdin=stdin) as running:
            return checked(running.wait())

    def each(self, work: Callable[[_Job], _Found], jobs: Iterable[_Job]) -> list[_Found]:
        """Map `work` over the jobs, `workers` at a time; the programs of a job share one CPU."""
        cpus = itertools.cycle(sorted(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(
            self.workers, initializer=lambda: os.sched_setaffinity(0, {next(cpus)})
        ) as pool:
            return list(pool.map(work, jobs))


def checked(result: Result) -> Result:
    """Return the result; raise RunStopped if the sandbox ended before it started a program."""
    if result.broken:
        raise RunStopped(
            f"a sandbox did not start its program ({result.broken}); fix that and resume the run."
        )
    return result


def kernel_limits(settings: SandboxConfig) -> dict[str, int]:
    """Resource limits by `setrlimit`'s names."""
    return {
        "AS": settings.memory_mib * 2**20,
        "CORE": 0,
        "CPU": settings.cpu_s,
        "FSIZE": _OUTPUT_BYTES,
        "NOFILE": 32,
        "NPROC": settings.processes,
    }


def open_sandbox(settings: SandboxConfig) -> Sandbox:
    """Open and try a sandbox: bubblewrap, or limits alone if `allow_weak` is set; InputError if none works."""
    if sys.platform != "linux":
        raise InputError("programs that a model wrote run on Linux only; use another reward than code.")
    workers = settings.workers or len(os.sched_getaffinity(0))
    bwrap = shutil.which("bwrap")
    missing = "bubblewrap was not found"
    if bwrap is not None:
        sandbox = Sandbox(settings, bubblewrap(bwrap, as_root=os.geteuid() == 0), workers)
        if not (failure := _failure(sandbox)):
            return sandbox
        missing = f"bubblewrap does not work here ({failure})"
    if not settings.allow_weak:
        raise InputError(
            f"the reward runs programs that a model wrote, and {missing}; install bubblewrap 0.8 or later (`apt "
            "install bubblewrap`), or accept limits without isolation with --set sandbox.allow_weak=true."
        )
    sandbox = Sandbox(settings, (), workers)
    if failure := _failure(sandbox):
        raise InputError(
            f"{missing}, and without it no program can be run either ({failure}); fix one of them."
        )
    return sandbox


def bubblewrap(bwrap: str, *, as_root: bool) -> tuple[str, ...]:
    """The bubblewrap (0.8+) command that isolates the next; root gets no user namespace, but may change its user id."""
    python = _INTERPRETER[0]
    shown = [python, str(Path(os.__file__).parents[1]), *_SHARED_LIBRARIES]
    user = ["--unshare-user", "--disable-userns"]
    if as_root:
        user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # By name: --unshare-all silently skips what it cannot have.
    kinds = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    return (
        *(bwrap, *user, *kinds, "--die-with-parent", "--new-session"),
        # A folder created as the parent of a file would be closed to all but its owner.
        *("--dir", "/dev", "--dir", os.path.dirname(python)),
        *(word for path in shown for word in ("--ro-bind-try", path, path)),
        *(word for path in ("/dev/null", "/dev/urandom") for word in ("--dev-bind", path, path)),
        *("--size", str(16 * 2**20), "--perms", "1777", "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp", "--"),
    )


def _failure(sandbox: Sandbox) -> str:
    with sandbox.start("run", sources=["import json; print('ready')"]) as running:
        result = running.wait()
    if result.broken or result.output == b"ready\n":
        return result.broken
    return f"a program that prints one word ended with exit code {result.exit_code}"


@cache
def _code() -> CodeType:
    # Compiled once here instead of in every sandbox.
    path = Path(inside.__file__)
    return compile(path.read_text(encoding="utf-8"), path.name, "exec")
