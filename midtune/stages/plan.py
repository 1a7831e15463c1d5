"""`midtune plan`: the memory and least time of training, before anything is loaded.

Weights, gradients and optimizer states follow from the configuration. Activations, keys and values come from running
the training code on tensors without data (see `midtune.planning.trace`).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from midtune.bench.workload import PLANNED
from midtune.config import RunConfig
from midtune.planning.budget import peak
from midtune.planning.search import MOST, planner_of
from midtune.planning.shared import between_cards
from midtune.planning.step_size import work_of
from midtune.processes import even_share


def run(config: RunConfig, *, gpu: str, prompt_tokens: int, devices: int = 1) -> dict[str, Any]:
    """Work out what training takes with prompts of up to `prompt_tokens`, for midtune and TRL, and what fits on `gpu`.

    `gpu` is a card by name or memory (see `card_named`), or `cpu` for this machine. Each of `devices` has a copy of the
    frozen model and an equal share of a step's prompts.

    Returns:
        `model`, `parameters`, `num_blocks`, `blocks`, `card` and `work`: what was planned for. `arms`: each with its
        name, `phases` (bytes of each part), the `peak` and its `phase`, whether it `fits`, and the least `seconds` of
        each phase. `fit`: setting changes that make midtune fit, None if none do. With them, `by_block`: midtune's
        peak for each first trained block, `fitted`: the arm, and `largest`: the largest number of prompts per update,
        group size and completion length, each with the rest as configured. `notes` say what the update cannot share,
        and what else would take less. `between`: see `between_cards`; None for a single card.

    Raises:
        InputError: the model, the card or a block is not known.
        MidtuneError: the architecture cannot run on tensors without data.
    """
    planner = planner_of(config, gpu)
    own = even_share(config.training.prompts_per_step, devices)
    work = work_of(config, prompt_tokens).changed({"training.prompts_per_step": own})
    blocks, sizes = planner.blocks, planner.sizes
    fit = planner.fitting(work)
    lean = None if fit is None else work.changed(fit)
    arms = [planner.arm(name, work) for name in PLANNED]
    ours = arms[0] if lean is None else planner.arm("midtune", lean)
    return {
        "schema": 1,
        "model": config.model.name,
        "parameters": sizes.total,
        "num_blocks": sizes.blocks,
        "blocks": blocks,
        "card": asdict(planner.card),
        "work": work.described(),
        "arms": arms,
        "by_block": [
            {
                "block": k,
                "peak": peak(
                    replace(planner, blocks=range(k, k + len(blocks))).phases("midtune", lean or work)
                )[1],
            }
            for k in range(sizes.blocks - len(blocks) + 1)
        ],
        "fit": fit,
        "notes": planner.notes,
        "fitted": None if lean is None else ours,
        "largest": None if lean is None else {what: planner.largest(lean, what) for what in MOST},
        "between": None if devices == 1 else between_cards(planner, lean or work, ours, devices),
    }
