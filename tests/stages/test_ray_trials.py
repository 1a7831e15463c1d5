"""Trials on Ray: the records are those of one process, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midtune.config import dump_config
from midtune.errors import InputError, RunStopped
from midtune.probe.trials import Job, Trial
from midtune.report.terminal import Terminal
from midtune.runs import REPORTED_PACKAGES, RunFolder, installed, read_jsonl
from midtune.stages import ray_trials
from midtune.stages.probe import run
from midtune.stages.ray_trials import MOST_TRIES, Probe, Room, as_they_end, connected, room_of, trial_of
from tests.stages.conftest import Configured

GB = 2**30
CORES = [{"CPU": 4.0, "memory": 10.0 * GB}, {"CPU": 2.0, "memory": 30.0 * GB}]
# Kills its process once, in the middle of training block 2.
KILLING = """
import os
import signal
from pathlib import Path

FOLDER = Path(__file__).parent

def killing(completions, **columns):
    trial = FOLDER / "run/trials/2-0/metrics.jsonl"
    if trial.is_file() and trial.read_text().count("\\n") == 3 and not (FOLDER / "killed").exists():
        (FOLDER / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(c[-1]["content"]) % 2) for c in completions]
"""
# Leaves the name of the network that its process is in.
WHERE = """
import os
from pathlib import Path

def where(completions, **columns):
    (Path(__file__).parent / f"network-{os.getpid()}").write_text(os.readlink("/proc/self/ns/net"))
    return [float(len(c[-1]["content"]) % 2) for c in completions]
"""
SWEEP = {
    "probe__method": "sweep",
    "probe__layers": "1-2",
    "model__quantize": "none",
    "training__steps": 4,
    "training__checkpoint_every": 2,
}
RACE = {"probe__budget": "14 steps", "training__steps": 4, "training__checkpoint_every": 2}


class Lost(Exception):
    pass


class Scripted:
    """Futures that end as scripted: job → what becomes of each try."""

    def __init__(self, outcomes: dict[str, list[Any]]) -> None:
        self.outcomes = outcomes

    def __call__(self, job: Job) -> Future[Any]:
        future: Future[Any] = Future()
        outcome = self.outcomes[job.name].pop(0)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future


def ended(outcomes: dict[str, list[Any]], said: list[str]) -> list[Any]:
    jobs = [Job((name, 0, 1, 1), name) for name in outcomes]
    return [*as_they_end(jobs, Scripted(outcomes), lambda e: isinstance(e, Lost), said.append)]


def test_what_is_lost_is_tried_again_and_said() -> None:
    said: list[str] = []
    assert sorted(ended({"a": [Lost(), Lost(), 1], "b": [2]}, said)) == [1, 2]
    assert said == ["a was lost with its worker (Lost); it is tried again"] * 2


def test_what_is_lost_again_and_again_ends_the_probe() -> None:
    said: list[str] = []
    with pytest.raises(
        RunStopped, match=rf"a was lost with its worker \(Lost\) {MOST_TRIES} times; .* --resume"
    ):
        ended({"a": [Lost()] * MOST_TRIES}, said)
    assert len(said) == MOST_TRIES - 1


def test_a_trials_own_error_is_raised() -> None:
    with pytest.raises(InputError, match="no such file"):
        ended({"a": [InputError("no such file")]}, [])


def test_trials_are_given_as_they_end() -> None:
    futures: dict[str, Future[Any]] = {name: Future() for name in "ab"}
    found = as_they_end(
        [Job((n, 0, 1, 1), n) for n in "ab"], lambda job: futures[job.name], lambda e: False, print
    )
    futures["b"].set_result("second")
    assert next(found) == "second"
    futures["a"].set_result("first")
    assert [*found] == ["first"]


def test_a_trial_asks_for_its_share_of_the_smallest_card() -> None:
    room = room_of([{"CPU": 8.0, "GPU": 2.0}], [80 * GB, 40 * GB], "auto", threads=4)
    assert room == Room(4, 40 * GB, on_card=True)
    # 13 of 40 are 0.325.
    assert room.asked(13 * GB) == {"num_gpus": 0.33, "num_cpus": 1}
    assert room.asked(60 * GB) == room.asked(None) == {"num_gpus": 1.0, "num_cpus": 1}


def test_without_cards_it_asks_for_cores_and_memory_that_one_node_has() -> None:
    assert room_of(CORES, [], "auto", threads=4) == Room(4, 10 * GB, on_card=False)
    room = room_of(CORES, [40 * GB], "cpu", threads=2)
    assert room == Room(2, 30 * GB, on_card=False)
    assert room.asked(3 * GB) == {"num_cpus": 2, "memory": 3 * GB}
    assert room.asked(50 * GB) == {"num_cpus": 2, "memory": 30 * GB}
    assert room.asked(None) == {"num_cpus": 2, "memory": 0}


@pytest.mark.parametrize(
    ("device", "threads", "message"),
    [
        ("cuda", 1, "device cuda was asked for, but no node has a card; use --device cpu"),
        ("auto", 8, "a trial asks for 8 cores, .* the largest node has 4; set OMP_NUM_THREADS"),
    ],
)
def test_what_no_node_has_is_refused(device: str, threads: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        room_of(CORES, [], device, threads)


@pytest.mark.parametrize("on", ["spark", "ray://", "ray://host", "ray:7", "ray://host:seven"])
def test_another_address_is_refused(on: str) -> None:
    with (
        pytest.raises(InputError, match=f"--on {on} is not known; use ray, or ray://HOST:PORT"),
        connected(on, "auto"),
    ):
        pass


def test_a_missing_ray_is_named_before_anything_is_written(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_trials.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs the package ray; install it with `pip install 'midtune\[ray\]'`"
    ):
        run(configured(**RACE), out=tmp_path / "run", resume=None, on="ray", terminal=terminal)
    assert not (tmp_path / "run").exists()


def told(folder: RunFolder) -> Probe:
    """What the workers of a probe in `folder` are told."""
    fingerprint = json.loads(folder.probe.read_text())["task_fingerprint"]
    return Probe(
        folder.config.read_text(),
        folder.path,
        Path.cwd(),
        (fingerprint, *installed(REPORTED_PACKAGES).items()),
        torch.get_num_threads(),
    )


def jobs_of(folder: RunFolder) -> dict[Any, Trial]:
    trials = [Trial(**(data or {})) for _, data in read_jsonl(folder.trials)]
    return {trial.key: trial for trial in trials}


def scores(trials: dict[Any, Trial]) -> dict[Any, Any]:
    return {key: (trial.greedy, trial.sampled) for key, trial in trials.items()}


def test_a_worker_runs_a_trial_as_the_probe_did(
    configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    run(configured(**SWEEP), out=tmp_path / "run", resume=None, terminal=terminal)
    folder = RunFolder(tmp_path / "run")
    expected = jobs_of(folder)
    job = Job((2, 0, 4, 8), "block 2")
    here = trial_of(told(folder), job)
    # A machine that does not see the folder writes nowhere but in a place of its own.
    away = trial_of(replace(told(folder), folder=tmp_path / "away"), job)
    assert scores({job.key: here}) == scores({job.key: away}) == scores({job.key: expected[job.key]})
    assert not (tmp_path / "away").exists()
    with pytest.raises(InputError, match="has other versions of midtune, .* or reads other problems"):
        trial_of(replace(told(folder), seen=("f",)), job)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NODE = {"num_cpus": 1, "memory": 8 * GB, "object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster_on(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that starts the first node of a cluster, with one core."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster()

    def start(**how: Any) -> Any:
        made.add_node(**NODE, include_dashboard=False, **how)
        return made

    yield start
    made.shutdown()


@pytest.fixture
def cluster(cluster_on: Callable[..., Any]) -> Any:
    """Two nodes of one core on this machine."""
    made = cluster_on()
    made.add_node(**NODE)
    return made


def test_lost_workers_change_nothing(
    cluster: Any, configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    (tmp_path / "killing.py").write_text(KILLING)
    config = configured(task__reward=f"{tmp_path / 'killing.py'}:killing", **SWEEP)
    found = run(config, out=tmp_path / "run", resume=None, on=f"ray://{cluster.address}", terminal=terminal)
    assert (tmp_path / "killed").exists()
    said = terminal.console.file.getvalue()  # type: ignore[attr-defined]
    assert "block 2 was lost with its worker (WorkerCrashedError); it is tried again" in said
    alone = run(config, out=tmp_path / "alone", resume=None, terminal=terminal)
    assert same(found, alone)
    assert scores(jobs_of(RunFolder(tmp_path / "run"))) == scores(jobs_of(RunFolder(tmp_path / "alone")))
    assert not (tmp_path / "run/trials").exists()


MEASURED = {"step_cost", "gain_per_second", "cost_seconds"}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in MEASURED}
    return [plain(item) for item in value] if isinstance(value, list) else value


def same(found: Any, expected: Any) -> bool:
    return bool(plain(found) == plain(expected))


def when(happened: Callable[[], bool], do: Callable[[], Any]) -> threading.Thread:
    """Do something as soon as something happened, within minutes."""

    def watch() -> None:
        until = time.monotonic() + 300
        while not happened() and time.monotonic() < until:
            time.sleep(0.05)
        do()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def lines(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0


@pytest.mark.slow
def test_a_lost_node_changes_no_decision_of_a_race(
    cluster: Any, configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(**RACE)
    node = cluster.worker_nodes.copy().pop()
    records = tmp_path / "run/trials.jsonl"
    gone = when(lambda: lines(records) >= 2, lambda: cluster.remove_node(node, allow_graceful=False))
    found = run(config, out=tmp_path / "run", resume=None, on=f"ray://{cluster.address}", terminal=terminal)
    gone.join()
    assert len(cluster.worker_nodes) == 0
    alone = run(config, out=tmp_path / "alone", resume=None, terminal=terminal)
    assert same(found, alone)
    assert scores(jobs_of(RunFolder(tmp_path / "run"))) == scores(jobs_of(RunFolder(tmp_path / "alone")))


@pytest.fixture
def away(cluster_on: Callable[..., Any]) -> Iterator[Any]:
    """Two nodes, the second in a network namespace of its own."""
    name, here, there = f"midtune{os.getpid()}", "10.77.0.1", "10.77.0.2"
    inside = ["ip", "netns", "exec", name]
    setup = [
        f"ip netns add {name}",
        f"ip link add {name[-9:]}a type veth peer name {name[-9:]}b netns {name}",
        f"ip addr add {here}/24 dev {name[-9:]}a",
        f"ip link set {name[-9:]}a up",
        f"ip -n {name} addr add {there}/24 dev {name[-9:]}b",
        f"ip -n {name} link set {name[-9:]}b up",
        f"ip -n {name} link set lo up",
    ]
    try:
        if any(subprocess.run(line.split(), capture_output=True).returncode for line in setup):
            pytest.skip("no network namespace can be made here")
        made = cluster_on(node_ip_address=here)
        sizes = ["--num-cpus=1", f"--memory={8 * GB}", f"--object-store-memory={80 * 2**20}"]
        script = [str(Path(sys.executable).with_name("ray")), "start", f"--address={made.address}", "--block"]
        with subprocess.Popen([*inside, *script, f"--node-ip-address={there}", *sizes]) as node:
            yield made, node
            node.terminate()
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_a_node_in_a_network_of_its_own_runs_its_part(
    away: tuple[Any, Any], configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    made, node = away
    (tmp_path / "where.py").write_text(WHERE)
    config = configured(task__reward=f"{tmp_path / 'where.py'}:where", **SWEEP)
    time.sleep(10)
    found = run(config, out=tmp_path / "run", resume=None, on=f"ray://{made.address}", terminal=terminal)
    networks = {file.read_text() for file in tmp_path.glob("network-*")}
    assert len(networks) == 2
    assert same(found, run(config, out=tmp_path / "alone", resume=None, terminal=terminal))


@pytest.mark.slow
def test_a_killed_driver_is_resumed(
    cluster: Any, configured: Configured, tmp_path: Path, terminal: Terminal
) -> None:
    config = configured(**RACE)
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "midtune", "probe", "--recipe", str(tmp_path / "recipe.yaml")]
    words += ["--on", f"ray://{cluster.address}", "--out", str(tmp_path / "run")]
    driver = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    when(lambda: lines(tmp_path / "run/trials.jsonl") >= 2, lambda: driver.send_signal(signal.SIGKILL)).join()
    assert driver.wait() == -signal.SIGKILL
    before = (tmp_path / "run/trials.jsonl").read_text()
    found = run(config, out=None, resume=tmp_path / "run", on=f"ray://{cluster.address}", terminal=terminal)
    assert (tmp_path / "run/trials.jsonl").read_text().startswith(before)
    assert same(found, run(config, out=tmp_path / "alone", resume=None, terminal=terminal))


@pytest.mark.parametrize("listens", [True, False])
def test_an_address_where_no_ray_answers_is_said_within_seconds(
    configured: Configured,
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    listens: bool,
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_trials, "ANSWER_TIMEOUT_S", 3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        if not listens:
            other.close()
        with pytest.raises(
            InputError, match=f"no Ray cluster answers at 127.0.0.1:{port} .*`ray start --head` prints"
        ):
            run(
                configured(**RACE),
                out=tmp_path / "run",
                resume=None,
                on=f"ray://127.0.0.1:{port}",
                terminal=terminal,
            )
    assert not (tmp_path / "run").exists()
