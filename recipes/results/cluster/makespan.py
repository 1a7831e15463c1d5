"""How long a sweep takes on a Ray cluster whose cards fail: `python recipes/results/cluster/makespan.py`.

A simulation by events. As Ray does with tasks that all ask for the same, a free card takes the trial that has waited
longest. Cards fail independently, after times that are exponentially distributed. The trial of a failed card waits
again, behind all others, and goes on from its last checkpoint; the card comes back after a while.
"""

from __future__ import annotations

import heapq
import json
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HOUR = 3600.0
DRAWS = 1000


@dataclass(frozen=True)
class Trial:
    """A trial's work: it loads the model, takes its steps and is scored."""

    steps: int
    step_s: float
    load_s: float
    score_s: float

    def seconds(self, done: int = 0) -> float:
        """From a checkpoint at step `done` to the end."""
        return self.load_s + (self.steps - done) * self.step_s + self.score_s

    def kept(self, done: int, seconds: float, every: int | None) -> int:
        """The checkpoint that is there after `seconds` of going on from step `done`; None: there are none."""
        if every is None:
            return 0
        reached = done + max(0, int((seconds - self.load_s) / self.step_s))
        return self.steps if reached >= self.steps else reached // every * every


def bound(trials: Sequence[Trial], cards: int) -> float:
    """What no order of the trials is faster than: all work shared evenly, or the longest trial."""
    seconds = [trial.seconds() for trial in trials]
    return max(sum(seconds) / cards, max(seconds))


def makespan(
    trials: Sequence[Trial], cards: int, lifetime: Callable[[], float], *, every: int | None, repair_s: float
) -> tuple[float, int]:
    """Seconds until the last trial ends, and how many were lost on the way.

    `lifetime` draws how long a card works until it fails, `every` is the steps between checkpoints.
    """
    waiting = deque((trial, 0) for trial in trials)
    fails_at = [lifetime() for _ in range(cards)]
    idle = deque(range(cards))
    # (when, order, what has ended, which card is free, what waits again)
    events: list[tuple[float, int, int, int | None, tuple[Trial, int] | None]] = []
    now, left, lost, order = 0.0, len(trials), 0, 0

    def at(when: float, *, ended: int = 0, card: int | None = None, again: Any = None) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, ended, card, again))

    while left:
        while idle and waiting:
            card = idle.popleft()
            if fails_at[card] <= now:  # while it was idle
                back = fails_at[card] + repair_s
                fails_at[card] = back + lifetime()
                at(max(now, back), card=card)
                continue
            trial, done = waiting.popleft()
            end, failure = now + trial.seconds(done), fails_at[card]
            if end <= failure:
                at(end, ended=1, card=card)
                continue
            lost += 1
            at(failure, again=(trial, max(done, trial.kept(done, failure - now, every)) if every else 0))
            at(failure + repair_s, card=card)
            fails_at[card] = failure + repair_s + lifetime()
        now, _, ended, free, again = heapq.heappop(events)
        left -= ended
        if free is not None:
            idle.append(free)
        if again is not None:
            waiting.append(again)
    return now, lost


def sweep_of(model: str, card: str, *, steps: int, seeds: int) -> tuple[list[Trial], dict[str, Any]]:
    """The blocks' trials of a sweep, and what `midtune plan` says of them: least seconds and memory."""
    from midtune.config import load_config
    from midtune.planning.budget import peak
    from midtune.planning.search import planner_of
    from midtune.planning.step_size import work_of

    asked = {"model.name": model, "model.quantize": "none", "task.name": "openai/gsm8k:main"}
    config = load_config(None, {**asked, "training.steps": steps, "training.max_new_tokens": 1024})
    planner = planner_of(config, card)
    lowest = replace(planner, blocks=[0])
    work = work_of(config, 256)
    if (fit := lowest.fitting(work)) is None:
        raise SystemExit(f"block 0 of {model} cannot be trained on {card}")
    lean = work.changed(fit)
    # Weights read from a local disk.
    load_s = planner.sizes.total * 2 / 2e9
    trials, peaks = [], []
    for block in range(planner.sizes.blocks):
        arm = replace(planner, blocks=[block]).arm("midtune", lean)
        peaks.append(peak(arm["phases"])[1])
        step_s = sum(arm["seconds"].values())
        # As many completions as in scoring all held-out problems, greedy and 4 samples each.
        completions = config.task.most_held_out * (1 + config.evaluation.samples)
        score_s = arm["seconds"]["sampling"] * completions / work.batch().rows
        trials.append(Trial(steps, step_s, load_s, score_s))
    said = {
        "model": model,
        "card": asdict(planner.card),
        "settings": {**asked, "training.max_new_tokens": 1024, "prompt_tokens": 256, **fit},
        "peak_bytes": {
            "lowest": peaks[0],
            "highest": peaks[-1],
            "full": planner.arm("trl-full", lean)["peak"],
        },
        "step_s": {"lowest": trials[0].step_s, "highest": trials[-1].step_s},
        "trial_s": {"lowest": trials[0].seconds(), "highest": trials[-1].seconds()},
    }
    # The order of the probe: a seed's trials from the lowest block up, the longest first.
    return trials * seeds, said


def simulated(
    trials: Sequence[Trial], cards: int, *, hours: float | None, every: int | None
) -> dict[str, Any]:
    """Makespans of `DRAWS` sweeps on cards that fail once in so many `hours` on average; None: never."""
    random.seed(0)
    repair_s = 600.0

    def lifetime() -> float:
        return float("inf") if hours is None else random.expovariate(1 / (hours * HOUR))

    runs = [makespan(trials, cards, lifetime, every=every, repair_s=repair_s) for _ in range(DRAWS)]
    spans = sorted(span for span, _ in runs)
    return {
        "hours_between_failures": hours,
        "checkpoint_every": every,
        "mean_s": statistics.fmean(spans),
        "p95_s": spans[int(0.95 * DRAWS)],
        "of_bound": statistics.fmean(spans) / bound(trials, cards),
        "lost": statistics.fmean(lost for _, lost in runs),
    }


def main() -> None:
    cards = 64
    trials, said = sweep_of("qwen3-32b", "H100", steps=100, seeds=3)
    rows = [
        simulated(trials, cards, hours=hours, every=every)
        for hours, every in ((None, 50), (50_000, 50), (24, 50), (24, 10), (24, None))
    ]
    found = {**said, "cards": cards, "trials": len(trials), "bound_s": bound(trials, cards), "draws": DRAWS}
    text = json.dumps({**found, "simulated": rows}, indent=2)
    Path(__file__).with_name("qwen3-32b.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
