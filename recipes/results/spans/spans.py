"""How much of full training's gain spans of blocks reach, at `lr: auto`, beside full training at its best rate.

    python recipes/results/spans/spans.py --recipe recipes/sweep-tiny-chain-sum.yaml --seeds 3 --out spans.json \
        --spans 5 4-6 3-7 5-7

Runs begin alike, on the same prompts in the same order, and are scored on the same held-out problems, as in a sweep:
full training's rate is the recipe's `probe.full_lr`. Finished runs are kept with their scores by problem, so the same
command goes on from them; with `--records recipes/results/spans/NAME` from those that were published.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from midtune.config import load_config
from midtune.model.policy import Policy
from midtune.probe.contribution import contribution_interval, gain_interval
from midtune.probe.selection import parse_layers
from midtune.probe.trials import Runner, Trial, Trials, rows_of
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.stages.opening import Opened


def measure(
    recipe: Path, spans: Sequence[str], seeds: int, records: Path, terminal: Terminal
) -> dict[str, Any]:
    """Gains and shares C of the spans, over seeds; each span is for `parse_layers`."""
    config = load_config(recipe, {"training.lr": "auto"})
    opened = Opened(config, terminal)
    folder = RunFolder(records)
    folder.path.mkdir(parents=True, exist_ok=True)
    policy = opened.policy()
    runner = Runner(opened.sampler(policy), opened.task, config, terminal)
    problems = len(rows_of(opened.task, config)[1])
    trials = Trials(runner.in_turn(folder), config, policy.num_blocks, problems, folder, terminal)
    trials.total = (1 + len(spans)) * seeds
    (base,) = trials.run([trials.key("base")])
    by_arm: dict[str, list[Trial]] = {arm: [] for arm in ["full", *spans]}
    for seed in range(config.seed, config.seed + seeds):
        for arm, runs in by_arm.items():
            runs += trials.run([trials.key(arm, config.training.steps, seed=seed)])
    return {
        "model": opened.source.name,
        "task": opened.task.name,
        "seeds": seeds,
        "steps": config.training.steps,
        "problems": problems,
        "samples": config.evaluation.samples,
        "full_lr": config.probe.full_lr,
        "base": {"greedy": statistics.fmean(base.greedy), "sampled": float(base.scores.mean())},
        "arms": [_row(arm, runs, base, by_arm["full"], policy) for arm, runs in by_arm.items()],
    }


def _row(
    arm: str, runs: Sequence[Trial], base: Trial, full: Sequence[Trial], policy: Policy
) -> dict[str, Any]:
    scores, of_full = [run.scores for run in runs], [run.scores for run in full]
    greedy = [run.greedy for run in runs]
    share = None if arm == "full" else contribution_interval(scores, base.scores, of_full)
    blocks = [] if arm == "full" else parse_layers(arm, policy.num_blocks)
    parameters = sum(p.numel() for block in blocks for p in policy.blocks[block].parameters())
    return {
        "blocks": arm,
        "parameters": parameters or policy.total_parameters,
        "step_s": statistics.median(run.step_s for run in runs),
        "by_seed": [float(run.scores.mean() - base.scores.mean()) for run in runs],
        "sampled": asdict(gain_interval(scores, base.scores)),
        "greedy": asdict(gain_interval(greedy, base.greedy)),
        "contribution": share and asdict(share),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--spans", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--records", type=Path, help="where finished runs are kept (default: runs/spans-NAME)"
    )
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    records = asked.records or Path("runs") / f"spans-{asked.recipe.stem}"
    found = measure(asked.recipe, asked.spans, asked.seeds, records, Terminal())
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
