"""Rank blocks by a race or a sweep of short runs, in the shape of probe.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

import numpy as np

from midtune.config import RunConfig, parse_budget
from midtune.errors import InputError
from midtune.model.sizes import Sizes
from midtune.model.sources import Source
from midtune.probe.agreement import depth_correlation, middle_correlation
from midtune.probe.contribution import Scores, contribution_interval, gain_interval, plateau, standings
from midtune.probe.race import Budget, race
from midtune.probe.selection import best, best_first, from_the_middle, middle
from midtune.probe.trials import Trial, Trials, rows_of
from midtune.report.statistics import Estimate, score_interval
from midtune.runs import CHECKPOINT_BYTES_PER_PARAMETER, RunFolder
from midtune.tasks import Task

# Steps of the first trial in a timed race, to measure what a step costs.
FIRST_STEPS = 2
SCORE = ("score", "low", "high")
SHARE = ("contribution", "contribution_low", "contribution_high")
Rows = list[dict[str, Any]]


def check_probe(
    sizes: Sizes, task: Task, config: RunConfig, blocks: Sequence[int], folder: RunFolder
) -> None:
    """Check that `rank_blocks` can run.

    Raises:
        InputError: more blocks are to be selected than ranked, or a race has too few problems or too little disk space.
    """
    best(blocks, sizes.blocks, config.blocks.top_k)
    if config.probe.method != "race":
        return
    if len(rows_of(task, config)[1]) < 2:
        raise InputError(
            f"a race trains on some problems and scores on others, but {task.name} has {len(task.train)} to "
            "train on; use a task with more, or name the blocks with --layers."
        )
    folder.require_free(len(blocks) * sizes.block * CHECKPOINT_BYTES_PER_PARAMETER)


def rank_blocks(trials: Trials, source: Source, task: Task, blocks: Sequence[int]) -> dict[str, Any]:
    """Rank `blocks` of the model as the configuration of `trials` says.

    A race scores on training problems that its runs do not train on, so the held-out ones never influence the choice.
    A sweep scores on the held-out problems. `check_probe` must pass.

    Returns:
        The content of probe.json. `score`, `low` and `high` are the gain over the untrained model by samples at the
        training temperature, which show a gain sooner than greedy completions; those are in `greedy`. `step_cost` is
        seconds per training step. `contribution` is null in a race, which has no full training to compare with.
        `depth_baseline` is the geometric middle, always measured: a ranking has to beat it.

    Raises:
        RunStopped: rewards never differ within a group.
    """
    config, num_blocks = trials.config, trials.num_blocks
    is_race = config.probe.method == "race"
    (baseline,) = middle(num_blocks, 1)
    found, extra = (by_race if is_race else by_sweep)(trials, sorted({*blocks, baseline}))
    trials.forget()
    scores = {row["block"]: row["score"] for row in found}
    asked = (row for row in found if row["block"] in blocks)
    ranked = [{**row, "rank": rank} for rank, row in enumerate(asked, 1)]
    (base,) = trials.run([trials.key("base")])
    untrained = {"greedy": base.greedy, "sampled": base.sampled}
    return {
        **subject(source, num_blocks, task),
        "method": config.probe.method,
        "seed": config.seed,
        "seeds": 1 if is_race else config.probe.seeds,
        "settings": _settings(config, trials.problems),
        "cost_seconds": trials.spent_s,
        "cost_steps": trials.spent_steps,
        "base": {kind: asdict(score_interval(own)) for kind, own in untrained.items() if own is not None},
        **extra,
        "blocks": sorted(ranked, key=lambda row: row["block"]),
        "among_best": sorted(row["block"] for row in ranked if row["among_best"]),
        "selected": best([row["block"] for row in ranked], num_blocks, config.blocks.top_k),
        "depth_baseline": {"block": baseline, "score": scores[baseline]},
    }


def subject(source: Source, num_blocks: int, task: Task) -> dict[str, Any]:
    """What a probe.json is about; `matching_probe` compares it."""
    return {
        "schema": 1,
        "model": source.name,
        "revision": source.revision,
        "num_blocks": num_blocks,
        "task": task.name,
        "task_fingerprint": task.fingerprint,
    }


def by_race(trials: Trials, blocks: Sequence[int]) -> tuple[Rows, dict[str, Any]]:
    """Rank blocks, best first, by the gain of short runs within a budget: rows of probe.json and its further keys."""
    (base,) = trials.run([trials.key("base")])
    # In case the budget ends early: in all models known, the best blocks are near the middle.
    order = from_the_middle(blocks, trials.num_blocks)
    total, unit = parse_budget(trials.config.probe.budget)
    most_steps = trials.config.training.steps
    if unit == "steps":
        budget = Budget(total, lambda: trials.spent_steps, lambda: 1.0)
    else:
        trials.run([trials.key(order[0], min(FIRST_STEPS, most_steps), share=0)])
        budget = Budget(
            total, lambda: trials.spent_s, lambda: trials.seconds_per_step, lambda: trials.seconds_per_score
        )
    last: dict[int, Trial] = {}

    def run(blocks: Sequence[int], steps: int, share: float) -> dict[int, Scores]:
        found = trials.run([trials.key(block, steps, share=share) for block in blocks])
        last.update(zip(blocks, found, strict=True))
        return {block: last[block].scores for block in blocks}

    entrants = race(order, run, budget, most_steps=most_steps)
    rows = [
        {
            "block": entrant.block,
            **_gains([last[entrant.block]], base),
            "contribution": None,
            **asdict(entrant),
            "problems": len(last[entrant.block].greedy),
        }
        for entrant in entrants
    ]
    return rows, {}


def by_sweep(trials: Trials, blocks: Sequence[int]) -> tuple[Rows, dict[str, Any]]:
    """Train each block alone and all blocks, for all steps: rows of probe.json, best first, and its further keys."""
    config = trials.config
    seeds, steps = range(config.seed, config.seed + config.probe.seeds), config.training.steps
    # Full training first: it takes longest, and without its gain there is nothing to compare with.
    arms: list[int | str] = ["full", *blocks]
    trials.total = len(arms) * len(seeds)
    keys = {arm: [trials.key(arm, steps, seed=seed) for seed in seeds] for arm in arms}
    base, *_ = trials.run(
        [trials.key("base"), *(keys[arm][run] for run in range(len(seeds)) for arm in arms)]
    )
    full, *own_runs = (trials.run(keys[arm]) for arm in arms)
    runs = dict(zip(blocks, own_runs, strict=True))
    standing = standings({block: _scores(own) for block, own in runs.items()})
    rows = {}
    for block, own in runs.items():
        row = {"block": block, **_gains(own, base), "steps": steps, **asdict(standing[block])}
        row |= _named(contribution_interval(_scores(own), base.scores, _scores(full)), SHARE)
        row["greedy"] |= _named(contribution_interval(_greedy(own), base.greedy, _greedy(full)), SHARE)
        rows[block] = row
    scores = {block: row["score"] for block, row in rows.items()}
    shares = {block: row["contribution"] for block, row in rows.items()}
    undefined = None in shares.values()
    depth, to_middle = depth_correlation(scores), middle_correlation(scores, trials.num_blocks)
    gain = _gains(full, base)
    extra: dict[str, Any] = {
        "full": gain,
        "position": {"depth": depth and depth.value, "middle": to_middle and to_middle.value},
        "plateau": plateau(scores if undefined else shares),
    }
    if undefined:
        extra["note"] = (
            f"Full training gained {gain['score']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}), which is not "
            "clearly above zero: C(k) is a share of that gain, and is undefined. Blocks are ranked by their own."
        )
    return [rows[block] for block in best_first(scores)], extra


def _gains(trials: Sequence[Trial], base: Trial) -> dict[str, Any]:
    """Gains of runs over the base, sampled and greedy, and what their steps cost."""
    # A race may score on only the first problems.
    count = len(trials[0].greedy)
    gain = gain_interval(_scores(trials), base.scores[:count])
    step_s = float(np.median([trial.step_s for trial in trials]))
    return {
        **_named(gain, SCORE),
        "step_cost": step_s,
        "gain_per_second": gain.value / (step_s * trials[-1].steps),
        "greedy": _named(gain_interval(_greedy(trials), base.greedy[:count]), SCORE),
    }


def _scores(trials: Sequence[Trial]) -> Scores:
    return np.stack([trial.scores for trial in trials])


def _greedy(trials: Sequence[Trial]) -> Scores:
    return np.array([trial.greedy for trial in trials])


def _named(found: Estimate | None, names: tuple[str, str, str]) -> dict[str, float | None]:
    """A value and its bounds under the names of probe.json; all None if there is none."""
    return dict.fromkeys(names) if found is None else dict(zip(names, astuple(found), strict=True))


def _settings(config: RunConfig, problems: int) -> dict[str, Any]:
    sampling = {"group_size", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_strings"}
    training = {"lr", "algorithm", "beta", "prompts_per_step"}
    settings = {
        "quantize": config.model.quantize,
        **config.training.model_dump(include=sampling | training),
        "problems": problems,
        "samples": config.evaluation.samples,
        "selected_by": "greedy" if config.evaluation.samples == 0 else "sampled",
    }
    if config.probe.method == "sweep":
        settings |= {"steps": config.training.steps, "full_lr": config.probe.full_lr or config.training.lr}
    return settings
