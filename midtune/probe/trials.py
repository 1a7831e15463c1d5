"""Short training runs for a probe, of one block or all, from the same start; each is recorded when it ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.measure.meter import Meter
from midtune.model.memory import give_back
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
        trained: a block's number, `full`, or `base` for the scores before training.
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


@dataclass
class Trials:
    """Runs trials on one loaded policy, and records them in trials.jsonl; a recorded trial is not run again.

    Args:
        sampler: its policy has no trained blocks; each trial restores that.
        continued: keep checkpoints of finished trials, so that they can be trained for more steps.

    Attributes:
        done: trials asked for in this session, so a resumed race spends its budget as it would have.
    """

    sampler: Sampler
    task: Task
    config: RunConfig
    folder: RunFolder
    terminal: Terminal
    rows: Sequence[Row]
    problems: Sequence[Row]
    continued: bool = False
    total: int | None = None

    def __post_init__(self) -> None:
        self.policy = self.sampler.policy
        self.done: dict[Key, Trial] = {}
        self._checkpoints = self.folder.path / "trials"
        # Unquantized, a thawed block starts as it was frozen, so all runs of a seed share their first rollout.
        self._first: FirstRollouts = {}
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
        return sum(trial.score_s for trial in self.done.values()) / scored * len(self.problems)

    def _reached(self) -> dict[tuple[int | str, int], int]:
        """(what was trained, seed) → most steps."""
        return {(trained, seed): steps for trained, seed, steps, _ in sorted(self.done, key=itemgetter(2))}

    def base(self) -> Trial:
        key = ("base", self.config.seed, 0, len(self.problems))
        return self._known(key) or self._scored(key, "before training")

    def run(self, trained: int | str, steps: int, *, seed: int | None = None, share: float = 1.0) -> Trial:
        """Train a block, or `full`, up to `steps` steps, and score it on the first `share` of the problems.

        A shorter or interrupted trial is continued exactly if its checkpoint is there.
        """
        seed = self.config.seed if seed is None else seed
        problems = max(FEWEST_PROBLEMS, round(share * len(self.problems)))
        key = (trained, seed, steps, min(problems, len(self.problems)))
        if (known := self._known(key)) is not None:
            return known
        what = "all parameters" if trained == "full" else f"block {trained}"
        try:
            if trained == "full":
                self.policy.thaw_all()
            else:
                self.policy.thaw(int(trained))
            found = self._scored(key, what, *self._train(trained, steps, seed, what))
            if not self.continued:
                shutil.rmtree(self._folder(trained, seed).path, ignore_errors=True)
            return found
        finally:
            self.policy.restore()
            give_back()

    def forget(self) -> None:
        """Remove the checkpoints of trials, which are large."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    def _folder(self, trained: int | str, seed: int) -> RunFolder:
        return RunFolder(self._checkpoints / f"{trained}-{seed}")

    def _train(self, trained: int | str, steps: int, seed: int, what: str) -> tuple[float, float]:
        """Train up to `steps`; returns the median seconds of a step, and the total seconds."""
        own = self._folder(trained, seed)
        checkpoint, before = self._checkpoint(own, steps)
        recorded = self._reached().get((trained, seed), 0)
        earlier = {line["step"]: line["step_s"] for line in own.read_metrics()}
        # Steps that an earlier process did after its last record.
        seconds = [step_s for step, step_s in earlier.items() if step > recorded]
        earlier_s = sum(seconds)
        if checkpoint is not None and before == steps:
            load_trained(self.policy, checkpoint)
            # No new steps if it is only scored on more problems.
            return statistics.median(seconds or earlier.values()), earlier_s
        training = self.config.training
        lr = (self.config.probe.full_lr if trained == "full" else None) or training.lr
        settings = training.model_copy(update={"report_to": "none", "lr": lr})
        number = f"trial {len(self.done)}{f' of {self.total}' if self.total else ''}"
        # Episodes are tied to their environments and cannot be shared.
        alone = checkpoint is not None or self.policy.quantized or self.task.game is not None
        started = time.perf_counter()
        with self.terminal.progress(f"{number}: {what}", steps - before) as advance:

            def on_step(metrics: dict[str, Any]) -> None:
                seconds.append(metrics["step_s"])
                self.folder.make()
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

    def _scored(self, key: Key, what: str, step_s: float = 0.0, train_s: float = 0.0) -> Trial:
        trained, seed, steps, count = key
        started = time.perf_counter()
        rows = [*self.problems[:count]]
        found = score_rows(
            self.sampler, rows, self.task, self.config, f"scoring {what}", self.terminal.progress
        )
        sampled = None if found.sampled is None else found.sampled.tolist()
        score_s = time.perf_counter() - started
        trial = Trial(trained, seed, steps, found.greedy.tolist(), sampled, step_s, train_s, score_s)
        self.folder.append_jsonl(self.folder.trials, asdict(trial))
        self.done[key] = trial
        return trial

    def _known(self, key: Key) -> Trial | None:
        if (trial := self.done.get(key) or self._earlier.get(key)) is not None:
            self.done[key] = trial
        return trial
