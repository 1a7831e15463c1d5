"""Score the loaded policy on tasks of lm-evaluation-harness, with its own code."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from midtune.errors import InputError
from midtune.model.policy import Policy


def require_harness() -> None:
    """Raise InputError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "--lm-eval needs lm-evaluation-harness, which is not installed; `pip install 'midtune[lm-eval]'`."
        )


def harness_scores(
    policy: Policy, tasks: Sequence[str], *, folder: Path | None = None, seed: int = 0
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Scores of each document by task and by metric, such as `acc`.

    Leaves out corpus metrics, such as perplexity, which score no single document, and metrics where lower is better.
    `tasks` are names as in `lm_eval ls tasks`, a group for its tasks; `folder` holds the user's own task descriptions.
    Raises InputError if there is no such task, or none of its metrics can be used.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise InputError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` has the names, and "
            "--lm-eval-path names a folder with others."
        )
    # Trained fp32 blocks meet blocks in the compute dtype.
    with torch.no_grad(), policy.autocast():
        found: dict[str, Any] = simple_evaluate(
            model=HFLM(pretrained=policy.model, tokenizer=policy.tokenizer),
            tasks=list(tasks),
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    scores = {
        task: _by_metric(samples, found["higher_is_better"].get(task, {}))
        for task, samples in found["samples"].items()
    }
    if empty := [task for task, metrics in scores.items() if not metrics]:
        raise InputError(f"{', '.join(empty)} has no metric that scores single documents; leave it out.")
    return scores


def _by_metric(
    samples: Sequence[dict[str, Any]], higher_is_better: dict[str, bool]
) -> dict[str, NDArray[np.float64]]:
    """[n] scores by metric in document order; with several filters, the metric's name includes the filter's."""
    filters = {sample["filter"] for sample in samples}
    found: dict[tuple[str, str], list[Any]] = {}
    for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return {
        metric if len(filters) == 1 else f"{metric},{name}": np.array(values, dtype=np.float64)
        for (metric, name), values in found.items()
        if higher_is_better.get(metric, True) and all(isinstance(v, int | float | np.number) for v in values)
    }
