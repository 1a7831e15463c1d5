"""`midtune train --dry-run`: describe a run from its configuration alone, without loading or downloading anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midtune.config import PLANNED_CARD, PLANNED_PROMPT_TOKENS, RunConfig, require_task
from midtune.errors import InputError
from midtune.model.configs import config_of
from midtune.planning.scoring import plan_scoring
from midtune.planning.search import planner_of
from midtune.planning.step_size import work_of
from midtune.runs import RunFolder, run_stem
from midtune.tasks.sources.hub_dataset import is_dataset


def run(config: RunConfig, *, out: Path | None, resume: Path | None = None) -> dict[str, Any]:
    """Say what `midtune train` would do.

    Returns:
        `model`, `quantize`, `task`, `reward`, `algorithm`, `layers` as configured; `step`: its `prompts`, `group_size`,
        `completions` and at most `tokens` new ones; `steps`; `evaluation`: its `problems`, `samples` and estimated
        `share` of the run; `out`: the run folder; `downloads`: what is fetched unless cached; `weights_bytes`: their
        size at 2 bytes a parameter, or null. `plan`: the `blocks`, `trainable_parameters`, the `card` and
        `prompt_tokens` planned for, `peak` bytes and its `phase`, whether it `fits`, and the least `seconds` of each
        phase, with `notes` on the update; null, with a `note`, if the model's configuration is not at hand.

    Raises InputError if there is no such model or block, or the run cannot be saved there.
    """
    training, name = config.training, config.model.name
    completions = training.prompts_per_step * training.group_size
    # Creating a folder only picks its name; nothing is written.
    stem = run_stem(name, config.task.name)
    folder = RunFolder.create(out, stem) if resume is None else RunFolder.open(resume)
    task = require_task(config)
    downloads = {f"the weights of {name}": _is_fetched(name), f"the problems of {task}": is_dataset(task)}
    scoring = plan_scoring(config, config.task.most_held_out)
    found: dict[str, Any] = {
        "schema": 1,
        "model": name,
        "quantize": config.model.quantize,
        "task": task,
        "reward": config.task.reward,
        "algorithm": training.algorithm,
        "layers": config.blocks.layers or "as a ranking says, else the middle",
        "step": {
            "prompts": training.prompts_per_step,
            "group_size": training.group_size,
            "completions": completions,
            "tokens": completions * training.max_new_tokens,
        },
        "steps": training.steps,
        "evaluation": {
            "problems": scoring.problems,
            "samples": config.evaluation.samples,
            "share": scoring.share,
        },
        "out": str(folder),
        "downloads": [what for what, needed in downloads.items() if needed],
        "weights_bytes": None,
        "plan": None,
        "note": None,
    }
    try:
        config_of(name, network=False)
    except InputError:
        if not _is_fetched(name):
            raise
        return {**found, "note": "memory not known: config not at hand"}
    named = training.fit if training.fit not in (None, "auto", "none") else PLANNED_CARD
    planner = planner_of(config, named)
    sizes = planner.sizes
    whole = sizes.block - (0 if planner.model.with_experts else sizes.experts)
    each = whole if config.model.adapter == "full" else config.model.lora_rank * sizes.widths
    trained = len(planner.blocks) * each
    if config.blocks.select == "boost":
        trained = sizes.blocks * whole
    work = work_of(config, PLANNED_PROMPT_TOKENS)
    changes = {} if training.fit in (None, "none") else planner.fitting(work) or {}
    arm = planner.arm("midtune", work.changed(changes))
    return {
        **found,
        "weights_bytes": 2 * sizes.total if _is_fetched(name) else None,  # in bf16, as most are published
        "plan": {
            "blocks": planner.blocks,
            "trainable_parameters": trained,
            "card": planner.card.name,
            "prompt_tokens": PLANNED_PROMPT_TOKENS,
            "changes": changes,
            "notes": planner.notes,
            **{key: arm[key] for key in ("peak", "phase", "fits", "seconds")},
        },
    }


def _is_fetched(model: str) -> bool:
    return model.count("/") == 1 and not model.endswith(".gguf") and not Path(model).expanduser().exists()
