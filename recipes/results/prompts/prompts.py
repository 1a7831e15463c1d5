"""What is learned from prompts in turn and from chosen ones: held-out scores by step, and the groups that taught.

    python recipes/results/prompts/prompts.py --recipe recipes/smollm2-chain-sum.yaml --prompts auto --out a.json

Everything else is the recipe's, but for the learning rate, which is `auto`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from midtune.bench.curve import Curve
from midtune.config import load_config
from midtune.measure.meter import Meter
from midtune.report.terminal import Terminal
from midtune.rl.training import train_blocks
from midtune.stages.opening import Opened, choose_blocks

KEPT = ("reward", "equal_groups", "rollout_s", "update_s", "step_s")


def measure(recipe: Path, settings: dict[str, Any], every: int, terminal: Terminal) -> dict[str, Any]:
    """Train as the recipe says with `settings`, and score the model every `every` steps."""
    config = load_config(recipe, {"training.lr": "auto", **settings})
    opened, training = Opened(config, terminal), config.training
    task, policy = opened.task, opened.policy()
    sampler, meter = opened.sampler(policy), Meter(policy.device)
    (block,) = choose_blocks(config.blocks, policy, task, terminal).blocks

    def score(_: Any, of_base: bool) -> Any:
        return opened.score(sampler, "scoring", of_base=of_base).scores

    steps: list[dict[str, Any]] = []
    drawn = training.prompts_per_step * training.group_size
    curve = Curve(
        score, meter, training.steps, every, drawn, on_point=lambda point: terminal.message(str(point))
    )
    curve.begin(policy)
    policy.thaw(block)

    def on_step(metrics: dict[str, Any]) -> None:
        steps.append({key: metrics[key] for key in KEPT})
        curve.after(metrics["step"], metrics["step_s"])

    with tempfile.TemporaryDirectory() as folder:
        train_blocks(
            sampler,
            task.train,
            task.reward,
            training,
            folder=Path(folder),
            seed=config.seed,
            meter=meter,
            on_step=on_step,
            checkpoints=False,
        )
    return {
        "prompts": training.prompts,
        "seed": config.seed,
        "block": block,
        "points": curve.points,
        **{key: [round(step[key], 4) for step in steps] for key in KEPT},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--prompts", choices=["uniform", "auto"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=8, help="prompts of a step")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    settings = {
        "training.prompts": asked.prompts,
        "training.prompts_per_step": asked.count,
        "training.steps": asked.steps,
        "task.eval_size": asked.problems,
        "evaluation.samples": 2,
        "seed": asked.seed,
    }
    found = measure(asked.recipe, settings, asked.every, Terminal())
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
