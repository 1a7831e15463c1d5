"""Running programs that nobody trusts: apart from everything else, within limits, gone afterwards.

With bubblewrap (https://github.com/containers/bubblewrap) a program has process, network, IPC, host name
and mount namespaces of its own. It sees the standard library and the shared libraries, read-only, and an
empty `/tmp` in memory that it can write to; no other file, process or network exists for it, and no
`/proc`. An ordinary user's programs also get a user namespace, in which no further one can be made; those
of root get a user id of their own, since the kernel does not count the processes of root. The kernel
limits CPU time, address space, processes, open files and the size of files and output from within,
midtune wall time from without, and when a program ends or is ended, so do all processes of its namespace.

What is not guaranteed: a hole in the kernel is a way out; the limits of memory and CPU time hold for each
process, so that they multiply by `processes`; and memory outside of any address space (System V segments,
`memfd`) is bounded by wall time and open files alone.

Without bubblewrap isolation is *weak*: the same limits, an empty environment and an empty folder to begin
in, but the program can read and write what its user can, use the network, and leave processes behind.
There is nothing in between, since no package for namespaces, Landlock or seccomp is both maintained and
content with less than bubblewrap needs: pyseccomp is of 2021, landlock a development release that leaves
processes alone, sandlock wants Linux 6.7.
"""

from __future__ import annotations

import marshal
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

from midtune.errors import InputError, RunStopped
from midtune.tasks import inside

_OUTPUT_BYTES = 4 * 2**20
_FOLDER_BYTES = 16 * 2**20
_OPEN_FILES = 32
# The ids that systemd keeps for services without a user; no person and no file has one of them.
_PASSING_UIDS = range(61184, 65520)
_SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
# Sets are in the same order every time, so that a resumed run gives the rewards that it would have given.
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}
_BOOT = """\
import marshal, os, sys
with os.fdopen(int(sys.argv[1]), "rb") as file:
    code, job = marshal.load(file)
space = {"__name__": "inside"}
exec(code, space)
space["main"](job)
"""


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
        cpu_s: CPU seconds of each process.
        wall_s: seconds from its start.
        memory_bytes: address space of each process.
        processes: processes and threads.
    """

    cpu_s: int
    wall_s: float
    memory_bytes: int
    processes: int

    def of_kernel(self) -> dict[str, int]:
        """Resource limits by name, as `setrlimit` knows them."""
        return {
            "AS": self.memory_bytes,
            "CORE": 0,
            "CPU": self.cpu_s,
            "FSIZE": _OUTPUT_BYTES,
            "NOFILE": _OPEN_FILES,
            "NPROC": self.processes,
        }


@dataclass(frozen=True)
class Result:
    """What became of a program.

    Attributes:
        output: what it wrote to standard output, of which 4 MiB are kept.
        exit_code: 0 where it ended well.
        broken: what the sandbox said where it ended without starting the program; else empty.
    """

    output: bytes
    exit_code: int
    broken: str

    @property
    def killed(self) -> bool:
        """Whether it was ended from outside, as when its time was over."""
        # bubblewrap gives the signals of its programs as shells do.
        return self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL)


class Running:
    """A program in its sandbox; leaving the `with` block ends it and all its processes."""

    def __init__(self, process: subprocess.Popen[bytes], output: int, deadline: float, files: ExitStack):
        self._process = process
        self._output = output
        self._deadline = deadline
        self._files = files

    def wait(self, most_s: float | None = None) -> Result:
        """Let the program go on to its end or its deadline, and no longer.

        Args:
            most_s: let it go on for this long, in place of its deadline.
        """
        left_s = self._deadline - time.monotonic() if most_s is None else most_s
        ended = _ends(self._process.pid, max(left_s, 0.0))
        self._end()
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        said = self._process.stderr.read() or b""
        broken = ended and not said.endswith(inside.STARTED)
        why = said.decode(errors="replace").strip().rpartition("\n")[2] or "it said nothing"
        output = os.pread(self._output, _OUTPUT_BYTES, 0)
        return Result(output, self._process.returncode, why if broken else "")

    def _end(self) -> None:
        # Before the process is reaped its id cannot be another's. Its group is bubblewrap, with which all of
        # its namespace ends, or what a weakly isolated program has started.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._files.close()


@dataclass(frozen=True)
class Sandbox:
    """Starts programs within limits.

    Attributes:
        isolation: the command that a program is started with; empty for weak isolation.
        workers: how many programs to run at a time.
    """

    limits: Limits
    isolation: tuple[str, ...]
    workers: int = 1

    @property
    def warning(self) -> str | None:
        """What a person should know before programs run here."""
        if self.isolation:
            return None
        return (
            "programs that the model writes run with weak isolation: they can read and write what you can, and use "
            "the network."
        )

    def start(self, role: str, *, stdin: bytes = b"", fds: Sequence[int] = (), **job: Any) -> Running:
        """Start one of the roles of `inside.py`.

        Args:
            stdin: what the program can read from standard input.
            fds: file descriptors that it gets, under the same numbers.
            job: what the role needs.
        """
        uid = secrets.choice(_PASSING_UIDS) if os.geteuid() == 0 else None
        job |= {"role": role, "limits": self.limits.of_kernel(), "uid": uid}
        with ExitStack() as files:
            folder = "/tmp"
            if not self.isolation:
                folder = files.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                os.chmod(folder, 0o777)
            # Files, not pipes: nothing has to be read along, and the kernel's limit on files is one on output.
            handed, given, output = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            marshal.dump((_code(), job), handed)
            given.write(stdin)
            for file in (handed, given):
                file.seek(0)
            process = subprocess.Popen(
                [*self.isolation, *_interpreter(), "-c", _BOOT, str(handed.fileno())],
                stdin=given,
                stdout=output,
                stderr=subprocess.PIPE,
                env={**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                cwd=folder,
                pass_fds=(handed.fileno(), *fds),
                start_new_session=True,
            )
            assert process.stderr is not None
            files.callback(process.stderr.close)
            deadline = time.monotonic() + self.limits.wall_s
            return Running(process, output.fileno(), deadline, files.pop_all())

    def run(self, source: str, stdin: bytes = b"") -> Result:
        """Run a program to its end.

        Raises:
            RunStopped: the sandbox does not work any more.
        """
        with self.start("run", sources=[source], stdin=stdin) as running:
            return checked(running.wait())


def checked(result: Result) -> Result:
    """The result, if there was a program.

    Raises:
        RunStopped: the sandbox ended before it started one.
    """
    if result.broken:
        raise RunStopped(
            f"a sandbox did not start its program ({result.broken}); mend that and resume the run."
        )
    return result


def open_sandbox(limits: Limits, *, workers: int | None, allow_weak: bool) -> Sandbox:
    """A sandbox that has been tried: with bubblewrap, or with limits alone where that is allowed.

    Args:
        workers: programs at a time; None: one per CPU that this process may use.

    Raises:
        InputError: bubblewrap is missing or does not work and weak isolation is not allowed, or nothing works.
    """
    if sys.platform != "linux":
        raise InputError("programs that a model wrote run on Linux only; use another reward than code.")
    workers = workers or len(os.sched_getaffinity(0))
    bwrap = shutil.which("bwrap")
    missing = "bubblewrap was not found"
    if bwrap is not None:
        sandbox = Sandbox(limits, bubblewrap(bwrap, as_root=os.geteuid() == 0), workers)
        failure = _failure(sandbox)
        if not failure:
            return sandbox
        missing = f"bubblewrap does not work here ({failure})"
    if not allow_weak:
        raise InputError(
            f"the reward runs programs that a model wrote, and {missing}; install bubblewrap 0.8 or later (`apt "
            "install bubblewrap`), or accept limits without isolation with --set sandbox.allow_weak=true."
        )
    sandbox = Sandbox(limits, (), workers)
    failure = _failure(sandbox)
    if failure:
        raise InputError(
            f"{missing}, and without it no program can be run either ({failure}); mend one of them."
        )
    return sandbox


def bubblewrap(bwrap: str, *, as_root: bool) -> tuple[str, ...]:
    """The command that isolates the command after it.

    Args:
        bwrap: path of bubblewrap, 0.8 or later.
        as_root: for root: no user namespace, but the right to take on another user id.
    """
    shown = [_python(), str(Path(os.__file__).parents[1]), *_SHARED_LIBRARIES]
    user = (
        ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if as_root
        else ["--unshare-user", "--disable-userns"]
    )
    # By name, since --unshare-all goes on without what it cannot have.
    kinds = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    return (
        *(bwrap, *user, *kinds, "--die-with-parent", "--new-session"),
        # Made as the parent of a file, a folder is closed to all but its owner.
        *("--dir", "/dev", "--dir", os.path.dirname(_python())),
        *(word for path in shown for word in ("--ro-bind-try", path, path)),
        *(word for path in ("/dev/null", "/dev/urandom") for word in ("--dev-bind", path, path)),
        *("--size", str(_FOLDER_BYTES), "--perms", "1777", "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp", "--"),
    )


def _failure(sandbox: Sandbox) -> str:
    with sandbox.start("run", sources=["import json; print('ready')"]) as running:
        result = running.wait()
    if result.broken or result.output == b"ready\n":
        return result.broken
    return f"a program that prints one word ended with exit code {result.exit_code}"


def _ends(pid: int, most_s: float) -> bool:
    """Whether a child process ends within `most_s` seconds; it is not reaped."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(most_s * 1000))
    finally:
        os.close(handle)


def _python() -> str:
    return os.path.realpath(sys.executable)


def _interpreter() -> list[str]:
    # No site-packages, nothing from the folder, no caches to write.
    return [_python(), "-S", "-s", "-P", "-B"]


@cache
def _code() -> CodeType:
    # Compiled here once: as source it would be compiled again in every sandbox.
    path = Path(inside.__file__)
    return compile(path.read_text(encoding="utf-8"), path.name, "exec")
