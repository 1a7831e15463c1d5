"""`midtune vote`: score several runs of one base model, each alone and by majority.

A study (arXiv 2607.01232) found that a majority of seven models, each with a different single block trained,
beats the best of them. One model is loaded and each run's trained blocks are swapped in turn; a run votes on a
problem with the final answer of its greedy completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midtune.config import RunConfig, load_config, with_settings
from midtune.errors import InputError
from midtune.model.patch import Patch, apply_patch, read_patch, require_patch
from midtune.report.statistics import jaccard, paired_gain, score_interval
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import Evaluation
from midtune.stages.opening import Opened
from midtune.tasks import Row
from midtune.tasks.answers import extract, majority, reference_answer
from midtune.tasks.rewards import SOLVED


def run(targets: Sequence[str], config: RunConfig, *, terminal: Terminal) -> dict[str, Any]:
    """Score the runs `targets`, at least two of one base model, and the majority of their answers.

    `config` is the first run's own plus command-line changes; its model is replaced by the base.

    Returns:
        `model`, `task`, `quantize`; `base` and `vote`, greedy scores with intervals; `runs`, each with `run`,
        `blocks`, greedy `score` and `sampled` score or null; `gain_over_best`, of the vote over the run with the best
        greedy score (which flatters that run: it is chosen on the same problems); `solved_by_any` and
        `solved_by_all`, fractions of the problems; `overlap`, for each two runs, problems both solve over problems
        either solves, null if neither solves any.

    Raises InputError for fewer than two runs, a duplicate, an unfinished patch, or different base models.
    """
    folders = _patch_folders(targets)
    patches = [read_patch(folder) for folder in folders]
    first = patches[0]
    for target, patch in zip(targets, patches, strict=True):
        if (patch.base_model, patch.revision) != (first.base_model, first.revision):
            raise InputError(
                f"{targets[0]} was trained on {_base_of(first)} and {target} on {_base_of(patch)}; "
                "give runs of one base model."
            )
    config = with_settings(config, {"model.name": first.base_model, "model.revision": first.revision})
    opened = Opened(config, terminal)
    task = opened.task
    task.require_one_turn("`midtune vote`")
    _mention_known_problems(targets, folders, config, terminal)
    policy = opened.policy()
    sampler = opened.sampler(policy)
    # Find a patch that does not fit before spending time on scoring.
    with terminal.progress("trying the patches", len(folders)) as advance:
        for folder in folders:
            apply_patch(policy, folder)
            policy.restore()
            advance()
    base = opened.score(sampler, "scoring the base model", samples=0, of_base=True)
    found = []
    for number, folder in enumerate(folders, start=1):
        apply_patch(policy, folder)
        found.append(opened.score(sampler, f"scoring run {number} of {len(folders)}"))
        policy.restore()
    vote = vote_scores(task.held_out, found)
    best = max((each.greedy for each in found), key=lambda scores: float(scores.mean()))
    solved = [each.greedy >= SOLVED for each in found]
    return {
        "model": config.model.name,
        "task": task.name,
        "quantize": config.model.quantize,
        "base": asdict(score_interval(base.greedy)),
        "runs": [
            {
                "run": target,
                "blocks": patch.blocks,
                "score": asdict(score_interval(each.greedy)),
                "sampled": None if each.sampled is None else asdict(score_interval(each.sampled)),
            }
            for target, patch, each in zip(targets, patches, found, strict=True)
        ],
        "vote": asdict(score_interval(vote)),
        "gain_over_best": asdict(paired_gain(best, vote)),
        "solved_by_any": float(np.any(solved, axis=0).mean()),
        "solved_by_all": float(np.all(solved, axis=0).mean()),
        "overlap": [[jaccard(one, other) for other in solved] for one in solved],
    }


def vote_scores(rows: Sequence[Row], found: Sequence[Evaluation]) -> NDArray[np.float64]:
    """Scores [n] of the vote: on each problem, that of the first completion with the winning answer."""
    scores = np.zeros(len(rows))
    for place, row in enumerate(rows):
        reference = reference_answer(row["answer"])
        winner = majority([extract(each.completions[place], reference) for each in found])
        assert winner is not None
        scores[place] = found[winner].greedy[place]
    return scores


def _patch_folders(targets: Sequence[str]) -> list[Path]:
    if len(targets) < 2:
        raise InputError(f"a vote needs at least two runs and got {len(targets)}; give the folders of more.")
    folders: dict[Path, Path] = {}
    for target in targets:
        folder = require_patch(target)
        if folder.resolve() in folders:
            raise InputError(f"the patch of {target} was given twice, but has one vote; leave one out.")
        folders[folder.resolve()] = folder
    return list(folders.values())


def _base_of(patch: Patch) -> str:
    return patch.base_model + (f" at revision {patch.revision}" if patch.revision else "")


def _mention_known_problems(
    targets: Sequence[str], folders: Sequence[Path], config: RunConfig, terminal: Terminal
) -> None:
    """Say which runs may have trained on problems that are held out here."""
    here = f"seed {config.seed} and {config.task.most_held_out} held-out problems"
    for target, folder in zip(targets, folders, strict=True):
        recipe = folder.absolute().parent / "config.yaml"
        if not recipe.is_file():
            continue
        own = load_config(recipe, {})
        if own.task.name == config.task.name and (
            own.seed != config.seed or own.task.most_held_out < config.task.most_held_out
        ):
            terminal.message(
                f"{target} was trained with seed {own.seed} and {own.task.most_held_out} held-out problems, and is "
                f"scored with {here}: it may have learned from some of them."
            )
