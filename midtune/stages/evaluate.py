"""`midtune eval`: score a model, a run or a patch on held-out problems, beside the base model.

The base and the trained model answer the same problems with the same random numbers, so their difference is paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midtune.config import RunConfig, with_settings
from midtune.model.patch import apply_patch, patch_of, read_patch
from midtune.report.statistics import paired_gain, pass_at_k, score_interval
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import Evaluation
from midtune.rollout.harness import harness_scores, require_harness
from midtune.stages.opening import Opened
from midtune.tasks import Task
from midtune.tasks.rewards import SOLVED
from midtune.whole import require_writable, write_bytes

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
    """Score `target`, and its base model too if it is a run or a patch.

    Args:
        target: a model as `train` takes it, a run folder, or a patch folder; it replaces the configured model.
        configs: one per task, otherwise alike; a configuration without a task is not scored.
        lm_eval: lm-evaluation-harness tasks; `lm_eval_path` is a folder that defines them.
        results: a jsonl file for `problem_lines`.

    Returns:
        `model`, `patch` (blocks or null), `quantize`; the first task's `task`, `greedy` and `sampled` scores with
        intervals. `tasks`: each with `task`, the number of `samples`, `scores`, the base's scores `before` and the
        paired `gain` (both null for a model), by kind: `greedy`, `avg@n` and `pass@k`. `lm_eval`: the same, with the
        harness's metrics as kinds. `worse`: tasks with a gain whose interval lies below zero; null for a model.

    Raises InputError if the target, a task or a package is missing.
    """
    if lm_eval:
        require_harness()
    if results is not None:
        require_writable(results)
    patch_folder = patch_of(target)
    model: dict[str, str | None] = {"model.name": target}
    blocks = None
    if patch_folder is not None:
        patch = read_patch(patch_folder)
        model = {"model.name": patch.base_model, "model.revision": patch.revision}
        blocks = patch.blocks
    opened = [Opened(with_settings(config, model), terminal) for config in configs]
    first, named = opened[0], [each for each in opened if each.config.task.name is not None]
    tasks = [each.task for each in named]
    policy = first.policy()

    def score_all(what: str, of_base: bool = False) -> tuple[list[Evaluation], list[tuple[str, PerProblem]]]:
        found = [
            each.score(each.sampler(policy), f"{what} on {each.task.name}", of_base=of_base) for each in named
        ]
        scores = [
            (each.task.name, scores_by_kind(own, each.config.evaluation.k or []))
            for each, own in zip(named, found, strict=True)
        ]
        if lm_eval:
            with terminal.progress("lm-evaluation-harness", None):
                harness = harness_scores(policy, lm_eval, folder=lm_eval_path, seed=first.config.seed)
            scores.extend(harness.items())
        return found, scores

    arms = {}
    if patch_folder is not None:
        arms["before"] = score_all("scoring the base", of_base=True)
        apply_patch(policy, patch_folder)
    arms["after"] = score_all("scoring")
    if results is not None:
        lines = [
            json.dumps(line, ensure_ascii=False) + "\n"
            for arm, (found, _) in arms.items()
            for task, each in zip(tasks, found, strict=True)
            for line in problem_lines(task, arm, each)
        ]
        write_bytes(results, "".join(lines).encode("utf-8", "replace"))
    rows = [
        _row(task, after, arms["before"][1][place][1] if "before" in arms else None)
        for place, (task, after) in enumerate(arms["after"][1])
    ]
    scores = rows[0]["scores"] if tasks else {}
    return {
        "model": first.config.model.name,
        "patch": blocks,
        "task": tasks[0].name if tasks else None,
        "quantize": first.config.model.quantize,
        "greedy": scores.get("greedy"),
        "sampled": next((score for kind, score in scores.items() if kind.startswith("avg@")), None),
        "tasks": [
            {"samples": each.config.evaluation.samples, **row} for each, row in zip(named, rows, strict=False)
        ],
        "lm_eval": rows[len(named) :],
        "worse": None
        if patch_folder is None
        else [row["task"] for row in rows if any(gain["high"] < 0 for gain in row["gain"].values())],
    }


def scores_by_kind(found: Evaluation, ks: Sequence[int]) -> PerProblem:
    """Scores [n] by problem: `greedy`, `avg@n` over all n samples, and `pass@k`, where a score of 1 is correct."""
    kinds = {"greedy": found.greedy}
    if found.samples is not None and found.sampled is not None:
        drawn = found.samples.shape[1]
        kinds[f"avg@{drawn}"] = found.sampled
        correct = (found.samples >= SOLVED).sum(axis=1)
        kinds |= {f"pass@{k}": pass_at_k(drawn, correct, k) for k in ks}
    return kinds


def problem_lines(task: Task, arm: str, found: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield one line per problem: `task`, `arm` (`before` or `after` the patch), `question`, `answer`, the greedy
    `completion` and its score `greedy`, the `sampled` scores, and how many of them are `correct`.
    """
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

    row = {"task": task, "scores": scores(after), "before": None, "gain": None}
    if before is not None:
        gain = {kind: asdict(paired_gain(before[kind], own)) for kind, own in after.items()}
        row |= {"before": scores(before), "gain": gain}
    return row
