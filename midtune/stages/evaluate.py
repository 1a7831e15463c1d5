"""`midtune eval`: score a model, a run or a patch on held-out problems, beside the base model.

What training did elsewhere shows on tasks other than its own: the base and the trained model answer the same problems
with the same random numbers, so their difference is paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midtune.config import RunConfig
from midtune.errors import InputError
from midtune.model.patch import DESCRIPTION, apply_patch, read_patch
from midtune.model.policy import Policy
from midtune.report.statistics import paired_gain, pass_at_k, score_interval
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import Evaluation
from midtune.rollout.harness import harness_scores, require_harness
from midtune.stages.opening import Opened, score, with_model
from midtune.tasks import Task
from midtune.tasks.rewards import SOLVED
from midtune.whole import require_regular, write_bytes

PerProblem = dict[str, NDArray[np.float64]]


def run(
    target: str,
    configs: Sequence[RunConfig],
    *,
    terminal: Terminal,
    lm_eval: Sequence[str] = (),
    lm_eval_path: Path | None = None,
    results: Path | None = None,
) -> dict[str, Any]:
    """Score `target`, and the base model beside it where it is a run or a patch.

    Args:
        target: a model as `train` takes it, a run folder, or a patch folder.
        configs: one for each task, alike in all else; of a run folder, the run's own with the command line's
            changes. The model is replaced by the one that the target names. One without a task is not scored.
        lm_eval: tasks of lm-evaluation-harness.
        lm_eval_path: a folder that describes such tasks.
        results: a jsonl file to write, one problem a line, see `problem_lines`.

    Returns:
        `model`, `patch` (blocks or null), `quantize`; `task`, `greedy` and `sampled` scores with intervals, of the
        first task. `tasks`: for each its `task`, the number of `samples`, `scores`, those of the base `before` and
        the paired `gain` (both null for a model), by kind: `greedy`, `avg@n` and `pass@k`. `lm_eval`: the same, with
        the harness's metrics as kinds. `worse`: the tasks with a kind whose gain's interval lies below zero; null
        for a model.

    Raises:
        InputError: the target, a task or a package is missing.
    """
    if lm_eval:
        require_harness()
    if results is not None and not results.parent.is_dir():
        raise InputError(f"{results} was asked for, but {results.parent} is no folder; make it first.")
    if results is not None:
        require_regular(results)
    patch_folder = patch_of(target)
    if patch_folder is not None:
        patch = read_patch(patch_folder)
        name, revision = patch.base_model, patch.revision
    else:
        name, revision = target, configs[0].model.revision
    configs = [with_model(config, name, revision) for config in configs]
    named = [config for config in configs if config.task.name is not None]
    opened = Opened(configs[0], terminal)
    tasks = [Opened(config, terminal).task for config in named]
    policy = opened.policy()

    def score_all(what: str) -> tuple[list[Evaluation], dict[str, PerProblem]]:
        found = [
            score(opened.sampler(policy, task), task, config, terminal, f"{what} on {task.name}")
            for task, config in zip(tasks, named, strict=True)
        ]
        return found, _harness(policy, lm_eval, lm_eval_path, configs[0], terminal)

    before = score_all("scoring the base") if patch_folder is not None else None
    blocks = apply_patch(policy, patch_folder).blocks if patch_folder is not None else None
    after = score_all("scoring")
    if results is not None:
        arms = {"after": after[0]} if before is None else {"before": before[0], "after": after[0]}
        lines = [
            json.dumps(line, ensure_ascii=False) + "\n"
            for arm, found in arms.items()
            for task, each in zip(tasks, found, strict=True)
            for line in problem_lines(task, arm, each)
        ]
        write_bytes(results, "".join(lines).encode("utf-8", "replace"))

    def kinds(config: RunConfig, found: Evaluation) -> PerProblem:
        return scores_by_kind(found, config.evaluation.k or [])

    rows = [
        {"samples": config.evaluation.samples}
        | _row(task.name, kinds(config, after[0][i]), kinds(config, before[0][i]) if before else None)
        for i, (task, config) in enumerate(zip(tasks, named, strict=True))
    ]
    harness = [_row(task, own, before[1][task] if before else None) for task, own in after[1].items()]
    first = rows[0]["scores"] if rows else {}
    return {
        "model": name,
        "patch": blocks,
        "task": tasks[0].name if tasks else None,
        "quantize": configs[0].model.quantize,
        "greedy": first.get("greedy"),
        "sampled": next((score for kind, score in first.items() if kind.startswith("avg@")), None),
        "tasks": rows,
        "lm_eval": harness,
        "worse": None if before is None else [row["task"] for row in [*rows, *harness] if _is_worse(row)],
    }


def scores_by_kind(found: Evaluation, ks: Sequence[int]) -> PerProblem:
    """[n] scores of each problem: `greedy`, `avg@n` over all n samples, and `pass@k` for each k.

    A sample is correct when its score reaches 1.
    """
    kinds = {"greedy": found.greedy}
    if found.samples is not None and found.sampled is not None:
        drawn = found.samples.shape[1]
        kinds[f"avg@{drawn}"] = found.sampled
        correct = (found.samples >= SOLVED).sum(axis=1)
        kinds |= {f"pass@{k}": pass_at_k(drawn, correct, k) for k in ks}
    return kinds


def problem_lines(task: Task, arm: str, found: Evaluation) -> Iterator[dict[str, Any]]:
    """One line for each problem: `task`, `arm` (`before` or `after` the patch), `question`, `answer`, the greedy
    `completion` and its score `greedy`, the `sampled` scores, and how many of them are `correct`."""
    for place, row in enumerate(task.held_out):
        sampled = [] if found.samples is None else found.samples[place].tolist()
        yield {
            "task": task.name,
            "arm": arm,
            "question": row.get("question"),
            "answer": row.get("answer"),
            "completion": found.completions[place],
            "greedy": float(found.greedy[place]),
            "sampled": sampled,
            "correct": sum(score >= SOLVED for score in sampled),
        }


def _row(task: str, after: PerProblem, before: PerProblem | None) -> dict[str, Any]:
    def scores(found: PerProblem) -> dict[str, Any]:
        return {kind: asdict(score_interval(own)) for kind, own in found.items()}

    return {
        "task": task,
        "scores": scores(after),
        "before": None if before is None else scores(before),
        "gain": None
        if before is None
        else {kind: asdict(paired_gain(before[kind], own)) for kind, own in after.items()},
    }


def _is_worse(row: dict[str, Any]) -> bool:
    return any(gain["high"] < 0 for gain in row["gain"].values())


def _harness(
    policy: Policy, tasks: Sequence[str], folder: Path | None, config: RunConfig, terminal: Terminal
) -> dict[str, PerProblem]:
    if not tasks:
        return {}
    with terminal.progress("lm-evaluation-harness", None):
        return harness_scores(policy, tasks, folder=folder, seed=config.seed)


def patch_of(target: str) -> Path | None:
    """The patch folder of a run folder or patch folder; None for anything else.

    Raises:
        InputError: a run folder without a finished patch.
    """
    folder = Path(target)
    if (folder / DESCRIPTION).is_file():
        return folder
    if (folder / "config.yaml").is_file():
        if not (folder / "patch" / DESCRIPTION).is_file():
            raise InputError(
                f"{target} has no trained patch yet; finish it with `midtune train --resume {target}`."
            )
        return folder / "patch"
    return None
