"""Short training runs for a probe, of one block or all, from the same start; each is recorded when it ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from midtune.config import RunConfig
from midtune.device import cuda_devices
from midtune.errors import InputError
from midtune.measure.meter import Meter
from midtune.model.memory import give_back
from midtune.probe.selection import parse_layers
from midtune.report.terminal import Terminal
from midtune.rl.scoring import score_rows
from midtune.rl.trainer import load_trained
from midtune.rl.training import train_blocks
from midtune.rollout.sampling import Sampler
from midtune.rollout.text import AlikeSampler, FirstRollouts
from midtune.runs import RunFolder, read_jsonl, sealed
from midtune.tasks import Row, Task

# With fewer, a score says nothing.
FEWEST_PROBLEMS = 32
# What is trained, seed, steps, number of problems.
Key = tuple[int | str, int, int, int]


@dataclass(frozen=True)
class Trial:
    """A short run and its scores; a line of trials.jsonl.

    Attributes:
        trained: a block's number, several as `13-15`, `full`, or `base` for the scores before training.
        greedy, sampled: [N] scores by problem; `sampled` is the mean over samples, None if none are drawn.
        step_s: median seconds of a step.
        train_s, score_s: seconds that this record cost.
    """

    trained: int | str
    seed: int
    steps: int
    greedy: list[float]
    sampled: list[float] | None
    step_s: float = 0.0
    train_s: float = 0.0
    score_s: float = 0.0

    @property
    def scores(self) -> NDArray[np.float64]:
        """What ranks blocks: samples if there are any, since they show a gain first and are what training maximises."""
        return np.array(self.greedy if self.sampled is None else self.sampled)

    @property
    def key(self) -> Key:
        return self.trained, self.seed, self.steps, len(self.greedy)


@dataclass(frozen=True)
class Job:
    """A trial to run.

    Attributes:
        name: what it is, for people.
        recorded: up to which step an earlier trial has recorded the seconds.
    """

    key: Key
    name: str
    recorded: int = 0


# Runs jobs, which do not depend on each other, and gives each one's record as it ends.
Execute = Callable[[Sequence[Job]], Iterable[Trial]]


@dataclass
class Trials:
    """The trials of a probe, recorded in trials.jsonl as they end; a recorded one is not run again.

    Args:
        execute: here, one after the other (`Runner`), or elsewhere, many at a time.
        num_blocks, problems: how many the model has, and how many there are to score on.
        total: how many trials there will be, for people.

    Attributes:
        done: trials asked for in this session, so a resumed race spends its budget as it would have.
    """

    execute: Execute
    config: RunConfig
    num_blocks: int
    problems: int
    folder: RunFolder
    terminal: Terminal
    total: int | None = None

    def __post_init__(self) -> None:
        self.done: dict[Key, Trial] = {}
        self._earlier: dict[Key, Trial] = {}
        # Such as a last line cut short by a crash.
        damaged = 0
        for _, data in read_jsonl(self.folder.trials):
            try:
                trial = Trial(**(data or {}))
                self._earlier[trial.key] = trial
            except TypeError:
                damaged += 1
        if damaged:
            self.terminal.message(
                f"{damaged} damaged lines of {self.folder.trials.name} are left out, and their trials run again"
            )
        if self._earlier or damaged:
            # Rewrite whole lines only, so that the next record starts a new line.
            lines = [json.dumps(sealed(asdict(trial))) + "\n" for trial in self._earlier.values()]
            self.folder.write_text(self.folder.trials, "".join(lines))
            self.terminal.message(f"{len(self._earlier)} records are known from an earlier session")

    @property
    def spent_s(self) -> float:
        return sum(trial.train_s + trial.score_s for trial in self.done.values())

    @property
    def spent_steps(self) -> int:
        """Steps of all trials; a continued trial counts once."""
        return sum(self._reached().values())

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a step, with its share of a trial's overhead."""
        return sum(trial.train_s for trial in self.done.values()) / max(self.spent_steps, 1)

    @property
    def seconds_per_score(self) -> float:
        """Mean seconds of scoring on all problems."""
        scored = sum(len(trial.greedy) for trial in self.done.values())
        return sum(trial.score_s for trial in self.done.values()) / scored * self.problems

    def _reached(self) -> dict[tuple[int | str, int], int]:
        """(what was trained, seed) → most steps."""
        return {(trained, seed): steps for trained, seed, steps, _ in sorted(self.done, key=itemgetter(2))}

    def key(self, trained: int | str, steps: int = 0, *, seed: int | None = None, share: float = 1.0) -> Key:
        """The trial of a block, `full` or `base`, of `steps` steps in all, scored on the first `share` of problems."""
        problems = max(FEWEST_PROBLEMS, round(share * self.problems))
        return trained, self.config.seed if seed is None else seed, steps, min(problems, self.problems)

    def run(self, keys: Sequence[Key]) -> list[Trial]:
        """The trials of these keys, in this order; those that are not recorded are run."""
        self.done |= {key: self._earlier[key] for key in keys if key in self._earlier}
        new, reached = [key for key in keys if key not in self.done], self._reached()
        jobs = [
            Job(key, self._name(key, len(self.done) + place), reached.get(key[:2], 0))
            for place, key in enumerate(new)
        ]
        for trial in self.execute(jobs):
            self.folder.append_jsonl(self.folder.trials, asdict(trial))
            self.done[trial.key] = trial
        return [self.done[key] for key in keys]

    def _name(self, key: Key, number: int) -> str:
        of = f" of {self.total}" if self.total else ""
        return named(key) if key[0] == "base" else f"trial {number}{of}: {named(key)}"

    def forget(self) -> None:
        """Remove the checkpoints of trials, which are large."""
        shutil.rmtree(checkpoints_of(self.folder), ignore_errors=True)


def named(key: Key) -> str:
    """What a trial trains, for people."""
    return {"base": "before training", "full": "all parameters"}.get(str(key[0]), f"block {key[0]}")


def checkpoints_of(folder: RunFolder) -> Path:
    """Where the trials of a probe keep their checkpoints."""
    return folder.path / "trials"


def rows_of(task: Task, config: RunConfig) -> tuple[list[Row], list[Row]]:
    """What trials train on, and what they are scored on: in a race some of the training problems."""
    if config.probe.method != "race":
        return task.train, task.held_out
    trained = len(task.train) - min(config.task.most_held_out, len(task.train) // 3)
    return task.train[:trained], task.train[trained:]


class Runner:
    """Runs trials on one loaded policy, which has no trained blocks before and after each."""

    def __init__(self, sampler: Sampler, task: Task, config: RunConfig, terminal: Terminal) -> None:
        self.sampler, self.task, self.config, self.terminal = sampler, task, config, terminal
        self.policy = sampler.policy
        self.rows, self.problems = rows_of(task, config)
        # Unquantized, a thawed block starts as it was frozen, so all runs of a seed share their first rollout.
        self._first: FirstRollouts = {}

    def in_turn(self, folder: RunFolder) -> Execute:
        """What runs trials one after the other, for a probe in `folder`."""
        return lambda jobs: (self.run(job, folder) for job in jobs)

    def run(self, job: Job, folder: RunFolder) -> Trial:
        """Train and score; the policy and torch's random state are restored afterwards.

        A shorter or interrupted trial is continued exactly if its checkpoint is in the probe's `folder`.
        Raises RunStopped if rewards never differ within a group.
        """
        trained, seed = job.key[:2]
        with torch.random.fork_rng(devices=cuda_devices(self.policy.device)):
            if trained == "base":
                return self._scored(job.key)
            own = RunFolder(checkpoints_of(folder) / f"{trained}-{seed}")
            try:
                if trained == "full":
                    self.policy.thaw_all()
                else:
                    for block in parse_layers(str(trained), self.policy.num_blocks):
                        self.policy.thaw(block)
                found = self._scored(job.key, *self._train(job, own, folder))
                # A race may train it for more steps.
                if self.config.probe.method != "race":
                    shutil.rmtree(own.path, ignore_errors=True)
                return found
            finally:
                self.policy.restore()
                give_back()

    def _train(self, job: Job, own: RunFolder, folder: RunFolder) -> tuple[float, float]:
        """Train up to the job's steps; returns the median seconds of a step, and the total seconds."""
        trained, seed, steps, _ = job.key
        checkpoint, before = self._checkpoint(own, steps)
        earlier = {line["step"]: line["step_s"] for line in own.read_metrics()}
        # Steps that an earlier process did after its last record.
        seconds = [step_s for step, step_s in earlier.items() if step > job.recorded]
        earlier_s = sum(seconds)
        if checkpoint is not None and before == steps:
            load_trained(self.policy, checkpoint)
            # No new steps if it is only scored on more problems.
            return statistics.median(seconds or earlier.values()), earlier_s
        training = self.config.training
        lr = (self.config.probe.full_lr if trained == "full" else None) or training.lr
        # All trials get the same prompts.
        changes = {"report_to": "none", "lr": lr, "prompts": "uniform"}
        settings = training.model_copy(update=changes)
        # Episodes are tied to their environments and cannot be shared.
        alone = checkpoint is not None or self.policy.quantized or self.task.game is not None
        started = time.perf_counter()
        with self.terminal.progress(job.name, steps - before) as advance:

            def on_step(metrics: dict[str, Any]) -> None:
                seconds.append(metrics["step_s"])
                folder.make()
                own.append_jsonl(own.metrics, metrics)
                advance(1)

            train_blocks(
                self.sampler if alone else AlikeSampler(self.sampler, self._first, seed),
                self.rows,
                self.task.reward,
                settings,
                folder=own.checkpoints,
                seed=seed,
                meter=Meter(self.policy.device),
                on_step=on_step,
                stop_after=steps,
                resume_from=checkpoint,
            )
        return statistics.median(seconds), earlier_s + time.perf_counter() - started

    def _checkpoint(self, own: RunFolder, steps: int) -> tuple[Path | None, int]:
        """The checkpoint to continue from, and its step; a damaged trial starts over."""
        with contextlib.suppress(InputError):
            checkpoint, before, missing = own.rewind(self.terminal.message)
            if checkpoint is not None and not missing and before <= steps:
                return checkpoint, before
        shutil.rmtree(own.path, ignore_errors=True)
        return None, 0

    def _scored(self, key: Key, step_s: float = 0.0, train_s: float = 0.0) -> Trial:
        trained, seed, steps, count = key
        started = time.perf_counter()
        rows = [*self.problems[:count]]
        found = score_rows(
            self.sampler, rows, self.task, self.config, f"scoring {named(key)}", self.terminal.progress
        )
        sampled = None if found.sampled is None else found.sampled.tolist()
        score_s = time.perf_counter() - started
        return Trial(trained, seed, steps, found.greedy.tolist(), sampled, step_s, train_s, score_s)
