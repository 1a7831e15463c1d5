"""Short runs for a probe: one block alone, or everything, from the same start; each is recorded when it ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.measure.meter import Meter
from midtune.model.memory import give_back
from midtune.model.policy import Policy
from midtune.report.terminal import Terminal
from midtune.rl.trainer import FirstRollout, load_trained
from midtune.rl.training import train_blocks
from midtune.runs import RunFolder, sealed, unsealed
from midtune.stages.setup import score_policy
from midtune.tasks import Row, Task

# With fewer a score says nothing.
FEWEST_PROBLEMS = 32


@dataclass(frozen=True)
class Trial:
    """A run of a few steps and how it scored; a line of trials.jsonl.

    Attributes:
        trained: a block's number, `full`, or `base` for the scores before training.
        greedy, sampled: [N] scores of the problems; `sampled` is the mean over samples, None if none are drawn.
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
        """What blocks are ranked by: samples, which show a gain first and are what training maximises."""
        return np.array(self.greedy if self.sampled is None else self.sampled)


@dataclass
class Trials:
    """Runs trials on one loaded policy and remembers them, in the folder and from it.

    Args:
        policy: with no trained blocks; so it is again after each trial.
        rows: problems to train on.
        problems: what trials are scored on, in the same order each time.
        folder: keeps trials.jsonl; what it has already is not run again.
        continued: keep checkpoints of trials that have ended, so that they can go on for more steps.
        total: trials that are planned, for the person who watches; None: not known.

    Attributes:
        done: records in the order in which they were asked for. Those from an earlier session count when they
            are asked for again, so that what is planned by their cost is planned as it was.
    """

    policy: Policy
    task: Task
    config: RunConfig
    folder: RunFolder
    terminal: Terminal
    rows: Sequence[Row]
    problems: Sequence[Row]
    continued: bool = False
    total: int | None = None
    done: list[Trial] = field(init=False)

    def __post_init__(self) -> None:
        self.done = []
        self._earlier, damaged = _recorded(self.folder.trials)
        if damaged:
            self.terminal.message(
                f"{damaged} damaged lines of {self.folder.trials.name} are left out, and their trials run again"
            )
        # Where frozen weights are what a thawed block computes with, all runs of a seed begin alike.
        self._first: dict[int, FirstRollout] = {}
        if self._earlier or damaged:
            # Whole lines only, so that what comes next has a line of its own.
            lines = [json.dumps(sealed(asdict(trial))) + "\n" for trial in self._earlier]
            self.folder.write_text(self.folder.trials, "".join(lines))
            self.terminal.message(f"{len(self._earlier)} records are known from an earlier session")

    @property
    def spent_s(self) -> float:
        """Seconds that all trials took."""
        return sum(trial.train_s + trial.score_s for trial in self.done)

    @property
    def spent_steps(self) -> int:
        """Steps of all trials, each block's counted once."""
        reached: dict[tuple[int | str, int], int] = {}
        for trial in self.done:
            reached[trial.trained, trial.seed] = max(trial.steps, reached.get((trial.trained, trial.seed), 0))
        return sum(reached.values())

    @property
    def seconds_per_step(self) -> float:
        """What a step cost in the mean, with what a trial costs besides."""
        return sum(trial.train_s for trial in self.done) / max(self.spent_steps, 1)

    @property
    def seconds_per_score(self) -> float:
        """What scoring on all problems costs."""
        scored = sum(len(trial.greedy) for trial in self.done)
        return sum(trial.score_s for trial in self.done) / scored * len(self.problems)

    def base(self) -> Trial:
        """The scores before training."""
        seed = self.config.seed
        return self._known("base", seed, 0, len(self.problems)) or self._keep(
            self._scored("base", seed, 0, "scoring before training", self.problems)
        )

    def run(
        self,
        trained: int | str,
        steps: int,
        *,
        seed: int | None = None,
        lr: float | None = None,
        share: float = 1.0,
    ) -> Trial:
        """Train a block, or `full`, for so many steps in all, and score it on the first `share` of the problems.

        A trial of fewer steps, or one that a crash has cut short, is continued, exactly, if its checkpoint is there.
        """
        seed = self.config.seed if seed is None else seed
        problems = self.problems[: max(FEWEST_PROBLEMS, round(share * len(self.problems)))]
        known = self._known(trained, seed, steps, len(problems))
        if known is not None:
            return known
        try:
            if trained == "full":
                self.policy.thaw_all()
            else:
                self.policy.thaw(int(trained))
            what = "all parameters" if trained == "full" else f"block {trained}"
            step_s, train_s = self._train(trained, steps, seed, lr, what)
            what = f"scoring {what}"
            found = self._keep(self._scored(trained, seed, steps, what, problems, step_s, train_s))
            if not self.continued:
                shutil.rmtree(self._folder(trained, seed).path, ignore_errors=True)
            return found
        finally:
            self.policy.freeze_all()
            give_back()

    def forget(self) -> None:
        """Remove the checkpoints of trials, which are large."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    @property
    def _checkpoints(self) -> Path:
        return self.folder.path / "trials"

    def _folder(self, trained: int | str, seed: int) -> RunFolder:
        return RunFolder(self._checkpoints / f"{trained}-{seed}")

    def _train(
        self, trained: int | str, steps: int, seed: int, lr: float | None, what: str
    ) -> tuple[float, float]:
        """Median seconds of a step, and seconds in all."""
        settings = self.config.training.model_copy(
            update={"report_to": "none", "lr": lr or self.config.training.lr}
        )
        own = self._folder(trained, seed)
        reached, before = self._reached(own, steps)
        recorded = [trial.steps for trial in self.done if (trial.trained, trial.seed) == (trained, seed)]
        done = {line["step"]: line["step_s"] for line in own.read_metrics() if line["step"] <= before}
        # Of the steps since the last record, those that a process before this one did.
        seconds = [step_s for step, step_s in done.items() if step > max(recorded, default=0)]
        earlier_s = sum(seconds)
        if before == steps:
            assert reached is not None
            load_trained(self.policy, reached)
            # None where it is only scored on more problems.
            return statistics.median(seconds or done.values()), earlier_s
        number = f"trial {len(self.done)}{f' of {self.total}' if self.total else ''}"
        first = None if self.policy.quantized else self._first.setdefault(seed, FirstRollout())
        started = time.perf_counter()
        with self.terminal.progress(f"{number}: {what}", steps - before) as advance:

            def on_step(metrics: dict[str, Any]) -> None:
                seconds.append(metrics["step_s"])
                self.folder.make()
                own.append_jsonl(own.metrics, metrics)
                advance(1)

            train_blocks(
                self.policy,
                self.rows,
                self.task.reward,
                settings,
                folder=own.checkpoints,
                seed=seed,
                meter=Meter(self.policy.device),
                on_step=on_step,
                stop_after=steps,
                resume_from=reached,
                first=first,
                game=self.task.game,
            )
        return statistics.median(seconds), earlier_s + time.perf_counter() - started

    def _reached(self, own: RunFolder, steps: int) -> tuple[Path | None, int]:
        """The checkpoint that a trial of so many steps goes on from, and its step; a damaged trial begins again."""
        reached = None
        with contextlib.suppress(InputError):
            reached = own.latest_checkpoint(self.terminal.message)
        before = int(reached.name.rpartition("-")[2]) if reached is not None else 0
        missing = own.truncate_metrics(before)
        if reached is None or missing or before > steps:
            shutil.rmtree(own.path, ignore_errors=True)
            return None, 0
        return reached, before

    def _scored(
        self,
        trained: int | str,
        seed: int,
        steps: int,
        what: str,
        problems: Sequence[Row],
        step_s: float = 0.0,
        train_s: float = 0.0,
    ) -> Trial:
        started = time.perf_counter()
        samples = self.config.evaluation.samples
        found = score_policy(self.policy, self.task, problems, self.config, self.terminal, what, samples)
        sampled = None if found.sampled is None else found.sampled.tolist()
        score_s = time.perf_counter() - started
        return Trial(trained, seed, steps, found.greedy.tolist(), sampled, step_s, train_s, score_s)

    def _keep(self, trial: Trial) -> Trial:
        self.folder.append_jsonl(self.folder.trials, asdict(trial))
        self.done.append(trial)
        return trial

    def _known(self, trained: int | str, seed: int, steps: int, problems: int) -> Trial | None:
        def wanted(trial: Trial) -> bool:
            found = (trial.trained, trial.seed, trial.steps, len(trial.greedy))
            return found == (trained, seed, steps, problems)

        for trial in filter(wanted, self.done):
            return trial
        for trial in filter(wanted, self._earlier):
            self.done.append(trial)
            return trial
        return None


def _recorded(file: Path) -> tuple[list[Trial], int]:
    """The trials of a trials.jsonl, and how many lines are damaged, such as a last one that a crash cut short."""
    found, damaged = [], 0
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        if line:
            try:
                found.append(Trial(**unsealed(line)))
            except (ValueError, TypeError):
                damaged += 1
    return found, damaged
