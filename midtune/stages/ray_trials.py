"""Run a probe's trials on a Ray cluster: as many at a time as its cards, or its cores and memory, hold.

A trial is a task of Ray's, which starts it where the card memory that `midtune plan` says is free. Ray Tune is not
used: its schedulers (ASHA, median stopping, population-based training) stop a run by its own metric as it comes in. A
race compares blocks in pairs on the same problems, with intervals, so a round ends before its blocks are compared; a
sweep stops none. What is left is to run tasks that do not depend on each other, and Ray does that itself.

A trial depends on its job alone, so the records are those of a probe in one process, in the order in which they ended.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

from midtune.config import PLANNED_PROMPT_TOKENS, RunConfig, with_settings
from midtune.errors import InputError, MidtuneError, RunStopped, reason
from midtune.measure.cards import card_bytes
from midtune.network import HUB_OFFLINE, OFFLINE, REACH_TIMEOUT_S
from midtune.probe.trials import Execute, Job, Runner, Trial, checkpoints_of
from midtune.report.terminal import Terminal
from midtune.runs import REPORTED_PACKAGES, RunFolder, installed
from midtune.stages.opening import Opened
from midtune.tasks import Task

MOST_TRIES = 5
# Ray's store for large results; those of trials are small.
STORE_BYTES = 100 * 2**20
# Seconds to import Ray in, and be answered.
ANSWER_TIMEOUT_S = 30
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
# What workers need of this process's environment.
PASSED = (OFFLINE, HUB_OFFLINE, "MIDTUNE_CACHE", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True)
class Room:
    """What a trial may ask of a node: threads, and memory up to the smallest card's, or else the largest node's RAM."""

    threads: int
    most_bytes: int
    on_card: bool

    def asked(self, peak_bytes: int | None) -> dict[str, float]:
        """Ray's resources of a trial with this planned peak, None if it is not known.

        A plan above `most_bytes` asks for all of it: a trial whose memory runs out goes on with smaller batches.
        """
        share = 1.0 if peak_bytes is None else min(1.0, peak_bytes / self.most_bytes)
        if self.on_card:
            return {"num_gpus": math.ceil(100 * share) / 100, "num_cpus": 1}
        return {"num_cpus": self.threads, "memory": 0 if peak_bytes is None else int(share * self.most_bytes)}


@contextlib.contextmanager
def connected(on: str, device: str) -> Iterator[Room]:
    """Connect to a Ray cluster: `ray` (this machine's, else one that is started for the probe) or `ray://HOST:PORT`.

    Unless the environment says otherwise, a cluster that is started sends no usage statistics and has no dashboard.
    Raises InputError if Ray is not installed or does not answer, and as `room_of`.
    """
    address = on.removeprefix("ray").removeprefix("://")
    host, _, port = address.rpartition(":")
    if on != "ray" and not (on.startswith("ray://") and host and port.isdecimal()):
        raise InputError(f"--on {on} is not known; use ray, or ray://HOST:PORT for a cluster's address.")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--on ray needs the package ray; install it with `pip install 'midtune[ray]'`.")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    import torch

    passed = {"env_vars": {name: os.environ[name] for name in PASSED if name in os.environ}}
    init = functools.partial(ray.init, log_to_driver=False, logging_level="ERROR", runtime_env=passed)
    try:
        if address:
            _require_answer(host, int(port))
        init(address or "auto")
    except (OSError, OverflowError, subprocess.SubprocessError) as error:
        if address:
            why = reason(error) if isinstance(error, OSError) else "something else listens there"
            raise InputError(
                f"no Ray cluster answers at {address} ({why}); give the address that `ray start --head` prints, on a "
                "machine that has joined the cluster."
            ) from error
        init("local", include_dashboard=False, object_store_memory=STORE_BYTES)
    try:
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        yield room_of([*nodes.values()], _cards(nodes), device, torch.get_num_threads())
    finally:
        ray.shutdown()


def _require_answer(host: str, port: int) -> None:
    """Ask whether a Ray cluster is there, since `ray.init` would wait for minutes; raises what a failure raises."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"{host}:{port}"]
    socket.create_connection((host, port), timeout=REACH_TIMEOUT_S).close()
    subprocess.run(command, capture_output=True, check=True, timeout=ANSWER_TIMEOUT_S)


def room_of(nodes: Sequence[Mapping[str, float]], cards: Sequence[int], device: str, threads: int) -> Room:
    """What a trial may ask of nodes with these resources, on one of their `cards` (bytes) unless `device` is `cpu`.

    Without cards it is `threads` cores: as many as torch uses here, so that sums are rounded as in this process.
    Raises InputError if no node has what it asks for.
    """
    if cards and device != "cpu":
        return Room(threads, min(cards), on_card=True)
    if device not in ("auto", "cpu"):
        raise InputError(f"device {device} was asked for, but no node has a card; use --device cpu.")
    cores = max(node.get("CPU", 0) for node in nodes)
    if cores < threads:
        raise InputError(
            f"a trial asks for {threads} cores, as many as torch uses here, but the largest node has {cores:g}; "
            "set OMP_NUM_THREADS to that."
        )
    able = (node.get("memory", 0) for node in nodes if node.get("CPU", 0) >= threads)
    return Room(threads, int(max(able)), on_card=False)


def _cards(nodes: Mapping[str, Mapping[str, float]]) -> list[int]:
    """Bytes of every card; NVIDIA's library is asked on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asking = [
        ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(
            card_bytes
        )
        for node, resources in nodes.items()
        if resources.get("GPU")
    ]
    return [size for sizes in ray.get([task.remote() for task in asking]) for size in sizes]


def on_ray(room: Room, opened: Opened, folder: RunFolder) -> Execute:
    """What runs trials on the connected cluster, for a probe that has begun in `folder`.

    A trial whose worker or node is lost goes on from its last checkpoint, where nodes share the folder. Checkpoints do
    not travel: where they share none, a trial that is lost, or that a race continues, starts over, to the same end.
    """
    import ray

    settings = folder.config.read_text(encoding="utf-8")
    probe = Probe(settings, folder.path, Path.cwd(), _seen(opened.task), room.threads)
    planned = _planned(opened, room)

    def submit(job: Job) -> Future[Trial]:
        # On a card Ray ends the process after the task, which gives the memory back.
        task = ray.remote(max_retries=0, **room.asked(planned(job.key[0])))(trial_of)
        future: Future[Trial] = task.remote(probe, job).future()
        return future

    def is_loss(error: BaseException) -> bool:
        return isinstance(error, ray.exceptions.RayError) and not isinstance(
            error, ray.exceptions.RayTaskError
        )

    def execute(jobs: Sequence[Job]) -> Iterator[Trial]:
        with opened.terminal.progress(f"{len(jobs)} trials on Ray", len(jobs)) as advance:
            try:
                for trial in as_they_end(jobs, submit, is_loss, opened.terminal.message):
                    advance(1)
                    yield trial
            except ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from error

    return execute


def as_they_end(
    jobs: Sequence[Job],
    submit: Callable[[Job], Future[Trial]],
    is_loss: Callable[[BaseException], bool],
    on_message: Callable[[str], None],
) -> Iterator[Trial]:
    """Submit all jobs, and give their trials as they end; one that ends in a loss is submitted again.

    Raises what a trial raises, and RunStopped if one is lost `MOST_TRIES` times.
    """
    running = {submit(job): (job, 1) for job in jobs}
    while running:
        for ended in wait(running, return_when=FIRST_COMPLETED).done:
            job, tries = running.pop(ended)
            error = ended.exception()
            if error is None:
                yield ended.result()
                continue
            if not is_loss(error):
                raise error
            lost = f"{job.name} was lost with its worker ({type(error).__name__})"
            if tries == MOST_TRIES:
                raise RunStopped(f"{lost} {tries} times; see Ray's logs for why, then go on with --resume.")
            on_message(f"{lost}; it is tried again")
            running[submit(job)] = job, tries + 1


def _planned(opened: Opened, room: Room) -> Callable[[int | str], int | None]:
    """What is trained → planned peak in bytes; None for an architecture that cannot be planned."""
    from midtune.planning.budget import peak
    from midtune.planning.search import planner_of
    from midtune.planning.step_size import work_of
    from midtune.rollout.speech import prompt_ids

    task = opened.task
    # What an environment will show is not known.
    rows = [] if task.game is not None else [*task.train, *task.held_out]
    lengths = [len(prompt_ids(opened.tokenizer, row["prompt"])) for row in rows]
    here = {"model.name": str(opened.source.folder), "blocks.layers": None}
    card = f"{room.most_bytes / 2**30}GB" if room.on_card else "cpu"
    planner = planner_of(with_settings(opened.config, here), card)
    work = work_of(opened.config, max(lengths, default=PLANNED_PROMPT_TOKENS))

    @functools.cache
    def of(trained: int | str) -> int | None:
        arm = "trl-full-kept" if trained == "full" else "midtune"
        # Scoring alone holds less than training the last block.
        block = trained if isinstance(trained, int) else planner.sizes.blocks - 1
        try:
            return peak(replace(planner, blocks=[block]).phases(arm, work))[1]
        except MidtuneError:
            return None

    return of


@dataclass(frozen=True)
class Probe:
    """What a worker is told: the probe's config.yaml and folder, and what else was so where it was started."""

    settings: str
    folder: Path
    directory: Path
    seen: Hashable
    threads: int


def trial_of(probe: Probe, job: Job) -> Trial:
    """Run a trial in this process, a worker of Ray's."""
    from filelock import FileLock

    runner, folder = _runner(probe), RunFolder(probe.folder)
    with contextlib.ExitStack() as held:
        if folder.config.is_file() and folder.config.read_text(encoding="utf-8") == probe.settings:
            # A worker that was given up as lost may still be writing.
            held.enter_context(FileLock(checkpoints_of(folder) / f"{job.key[0]}-{job.key[1]}.lock"))
        else:
            folder = RunFolder(Path(held.enter_context(tempfile.TemporaryDirectory())))
        return runner.run(job, folder)


def _seen(task: Task) -> Hashable:
    """What has to be the same on all machines."""
    return task.fingerprint, *installed(REPORTED_PACKAGES).items()


@functools.lru_cache(maxsize=1)
def _runner(probe: Probe) -> Runner:
    """The policy and the task, loaded once in a process."""
    import torch
    import yaml

    # Paths in the settings are as they were typed.
    with contextlib.suppress(OSError):
        os.chdir(probe.directory)
    torch.set_num_threads(probe.threads)
    config, terminal = RunConfig.model_validate(yaml.safe_load(probe.settings)), Terminal(quiet=True)
    opened = open_probe(config, terminal)
    if _seen(opened.task) != probe.seen:
        raise InputError(
            f"{socket.gethostname()} has other versions of {', '.join(REPORTED_PACKAGES)} than the machine where the "
            f"probe was started, or reads other problems or rewards from {opened.task.name}; give all the same."
        )
    return Runner(opened.sampler(opened.policy()), opened.task, config, terminal)


def open_probe(config: RunConfig, terminal: Terminal) -> Opened:
    """What a probe starts with; a race scores on extra problems of its own."""
    more = config.task.most_held_out if config.probe.method == "race" else 0
    return Opened(config, terminal, more_problems=more)
