from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from midtune.config import SandboxConfig
from midtune.errors import InputError, RunStopped
from midtune.tasks import open_sandbox
from midtune.tasks.sandbox.sandbox import Sandbox, bubblewrap, kernel_limits

LIMITS = SandboxConfig(cpu_s=1, wall_s=2.0, memory_mib=128, processes=4)


def test_a_program_reads_its_input_and_its_output_comes_back(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys\nprint(input(), sys.stdin.read(), __name__, sys.argv)", b"one\ntwo")
    assert result.output == b"one two __main__ ['program.py']\n"
    assert (result.exit_code, result.broken) == (0, "")


@pytest.mark.parametrize("source", ["1 / 0", "def", "import sys; sys.exit(3)", "import os; os.abort()"])
def test_a_program_that_fails_says_so(sandbox: Sandbox, source: str) -> None:
    result = sandbox.run(source)
    assert result.exit_code != 0
    assert (result.output, result.broken) == (b"", "")


def test_sets_are_in_the_same_order_every_time(sandbox: Sandbox) -> None:
    source = "print({str(n) for n in range(50)})"
    assert sandbox.run(source).output == sandbox.run(source).output


# Hostile programs.


def test_a_fork_bomb_meets_the_limit_on_processes(isolated: Sandbox) -> None:
    counted = (
        "import os, time\n"
        "try:\n"
        "    for n in range(50):\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "except OSError: print(n)"
    )
    assert 0 < int(isolated.run(counted).output) < LIMITS.processes
    before = psutil.Process().children(recursive=True)
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    result = replace(isolated, limits=LIMITS).run(bomb)
    assert result.exit_code != 0
    assert psutil.Process().children(recursive=True) == before


def test_a_memory_bomb_gets_no_more_than_its_limit(isolated: Sandbox) -> None:
    source = "blocks = []\ntry:\n    while True: blocks.append(bytes(2**20))\nexcept MemoryError: n = len(blocks)\n"
    source += "blocks = None; print(n)"
    assert 0 < int(isolated.run(source).output) < 128
    full = "for n in range(100):\n    with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(2**20))"
    assert isolated.run(full).exit_code != 0


def test_endless_output_is_cut_off(isolated: Sandbox) -> None:
    result = isolated.run("while True: print('x' * 1000)")
    assert result.exit_code != 0
    assert len(result.output) == 4 * 2**20


def test_an_endless_loop_ends_with_its_cpu_time_and_sleep_with_its_wall_time(isolated: Sandbox) -> None:
    start = time.monotonic()
    assert isolated.run("while True: pass").killed
    assert (
        replace(isolated, limits=LIMITS.model_copy(update={"wall_s": 0.5}))
        .run("import time\ntime.sleep(60)")
        .killed
    )
    assert time.monotonic() - start < isolated.limits.wall_s


def test_the_environment_of_the_parent_is_not_there(
    isolated: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "a-secret")
    result = isolated.run(
        "import os, glob\nprint(sorted(os.environ), glob.glob('/proc/*'))\n"
        f"for pid in (1, {os.getpid()}, os.getppid(), 'self'):\n"
        "    try: print(open(f'/proc/{pid}/environ').read())\n"
        "    except OSError: print('none')"
    )
    assert result.output.decode() == (
        "['HOME', 'LANG', 'PWD', 'PYTHONHASHSEED', 'PYTHONUTF8', 'TMPDIR'] []\n" + "none\n" * 4
    )


def test_there_is_no_network(isolated: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        source = (
            "import socket\n"
            "for host in ('127.0.0.1', '192.0.2.1'):\n"
            f"    try: socket.create_connection((host, {server.getsockname()[1]}), 1)\n"
            "    except OSError: print('no')"
        )
        assert isolated.run(source).output == b"no\nno\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_outside_its_folder_can_be_written(isolated: Sandbox, tmp_path: Path) -> None:
    own = f"/tmp/{tmp_path.parent.name}-x"
    paths = [
        str(tmp_path / "x"),
        os.path.expanduser("~/x"),
        "/x",
        "/dev/x",
        "/usr/lib/x",
        os.__file__,
        own,
    ]
    source = f"for path in {paths}:\n    try: open(path, 'a'); print(path)\n    except OSError: pass"
    assert isolated.run(source).output.decode() == f"{own}\n"
    assert not (tmp_path / "x").exists()
    assert not Path(own).exists()


def test_no_process_outside_can_be_killed(isolated: Sandbox) -> None:
    source = (
        "import os, signal\n"
        f"for pid in ({os.getpid()}, {os.getppid()}, os.getppid()):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass\n"
        "print('alive')"
    )
    # That this test goes on is the point.
    assert isolated.run(source).output == b"alive\n"


def test_links_lead_nowhere(isolated: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-secret")
    source = (
        "import os\n"
        f"for place, target in enumerate([{str(secret)!r}, '/etc/passwd', '/proc/1/root', '../../..{secret}']):\n"
        "    link = f'/tmp/link{place}'\n"
        "    os.symlink(target, link)\n"
        "    for mode in 'rw':\n"
        "        try: print(open(link, mode).read())\n"
        "        except OSError: print('none')"
    )
    assert isolated.run(source).output == b"none\n" * 8
    assert secret.read_text() == "a-secret"


def test_what_stays_behind_ends_with_the_program(isolated: Sandbox) -> None:
    before = psutil.Process().children(recursive=True)
    start = time.monotonic()
    isolated.run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)")
    assert time.monotonic() - start < isolated.limits.wall_s
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up being root")
def test_no_program_runs_as_root(isolated: Sandbox) -> None:
    source = "import os\nprint(0 in os.getresuid() + os.getresgid(), os.getgroups())\nos.setuid(0)"
    result = isolated.run(source)
    assert (result.output, result.exit_code) == (b"False []\n", 1)


def test_output_that_a_program_takes_back_does_not_break_the_sandbox(isolated: Sandbox) -> None:
    source = "import os\nprint('a', flush=True)\nos.ftruncate(1, 0)\nos.lseek(1, 0, 0)\nos.write(2, b'bwrap: broken')"
    result = isolated.run(source)
    assert (result.output, result.broken) == (b"", "")


# What is asked of bubblewrap and of the kernel, whether or not it is there.


def test_the_command_isolates_all_that_it_can() -> None:
    command = bubblewrap("/usr/bin/bwrap", as_root=False)
    assert command[0] == "/usr/bin/bwrap"
    kinds = {"--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"}
    assert kinds | {"--disable-userns", "--die-with-parent", "--new-session"} <= set(command)
    written = [
        command[i + 1] for i, word in enumerate(command) if word in ("--bind", "--bind-try", "--dev-bind")
    ]
    assert written == ["/dev/null", "/dev/urandom"]
    assert command[command.index("--size") :][:6] == (
        "--size",
        str(16 * 2**20),
        "--perms",
        "1777",
        "--tmpfs",
        "/tmp",
    )
    assert "--proc" not in command
    # Whatever is made after this could be written to.
    assert command[-5:] == ("--remount-ro", "/", "--chdir", "/tmp", "--")


def test_root_keeps_no_more_than_changing_its_user_takes() -> None:
    command = bubblewrap("bwrap", as_root=True)
    assert "--unshare-user" not in command
    assert command[1:3] == ("--cap-drop", "ALL")
    kept = {command[i + 1] for i, word in enumerate(command) if word == "--cap-add"}
    assert kept == {"CAP_SETUID", "CAP_SETGID"}


def test_limits_of_the_kernel() -> None:
    assert kernel_limits(LIMITS) == {
        "AS": 128 * 2**20,
        "CORE": 0,
        "CPU": 1,
        "FSIZE": 4 * 2**20,
        "NOFILE": 32,
        "NPROC": 4,
    }


def fake_bwrap(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    path = folder / "bwrap"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_without_bubblewrap_weak_isolation_must_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_bwrap(tmp_path, monkeypatch, None)
    with pytest.raises(InputError, match="bubblewrap was not found; install .* sandbox.allow_weak=true"):
        open_sandbox(LIMITS)
    try:
        weak = open_sandbox(LIMITS.model_copy(update={"workers": 3, "allow_weak": True}))
    except InputError as error:
        # As where no other user can read this Python.
        assert "without it no program can be run either" in str(error)
        weak = Sandbox(LIMITS, (), 3)
    assert (weak.isolation, weak.workers) == ((), 3)
    assert weak.warning is not None
    assert "weak isolation" in weak.warning


def test_bubblewrap_that_does_not_work_is_no_isolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_bwrap(tmp_path, monkeypatch, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    with pytest.raises(
        InputError, match=r"does not work here \(bwrap: No permissions to create new namespace\)"
    ):
        open_sandbox(LIMITS)


def test_a_sandbox_that_breaks_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bwrap(tmp_path, monkeypatch, "exit 1")
    broken = Sandbox(LIMITS, (str(tmp_path / "bwrap"),))
    with pytest.raises(RunStopped, match=r"did not start its program \(it said nothing\)"):
        broken.run("print(1)")
