"""The three ways in which `midtune probe` ranks blocks, each from a configuration to lines of probe.json."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from midtune.config import RunConfig, parse_budget
from midtune.errors import InputError
from midtune.measure.meter import Meter
from midtune.model.policy import Policy
from midtune.probe.agreement import Correlation
from midtune.probe.contribution import (
    Estimate,
    Scores,
    contribution_interval,
    depth_correlation,
    gain_interval,
    middle_correlation,
    plateau,
    ranking,
    standings,
)
from midtune.probe.race import Budget, race
from midtune.probe.selection import from_the_middle
from midtune.probe.trials import Trial, Trials
from midtune.report.statistics import score_interval
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import score_completions
from midtune.rollout.speech import prompt_ids
from midtune.runs import RunFolder
from midtune.stages.setup import require_one_turn, sampling_of
from midtune.tasks import Task

if TYPE_CHECKING:
    from midtune.rollout.sampling import Rollout

# A pass over all blocks keeps the inputs and output gradients of every linear layer: 2.3 times the memory of
# updating the middle block on the same tokens, where it was measured.
MEMORY_FACTOR = 3
# Enough for an interval over passes; fewer, larger passes compare more prompts with each other.
PASSES = 8
# What a race's first trial does to find out what a step costs.
FIRST_STEPS = 2
# A block's trained tensors and two Adam moments in fp32, in the two checkpoints that are kept and the one being
# written.
CHECKPOINT_BYTES_PER_PARAMETER = 3 * 3 * 4


@dataclass(frozen=True)
class Ranking:
    """What a method found.

    Attributes:
        rows: a line of probe.json for each block, the best first, without ranks.
        settings: what shaped it.
        extra: further keys of probe.json.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


def check_race(
    policy: Policy, task: Task, config: RunConfig, blocks: Sequence[int], folder: RunFolder
) -> None:
    """Check that a race can be run.

    Raises:
        InputError: there are too few problems, or there is no room for the trials' checkpoints.
    """
    if _race_problems(task, config) < 2:
        raise InputError(
            f"a race trains on some problems and scores on others, but {task.name} has {len(task.train)} to "
            "train on; use a task with more, or name the blocks with --layers."
        )
    parameters = sum(p.numel() for p in policy.blocks[0].parameters())
    folder.require_free(len(blocks) * parameters * CHECKPOINT_BYTES_PER_PARAMETER)


def _race_problems(task: Task, config: RunConfig) -> int:
    return min(config.task.eval_size, len(task.train) // 3)


def by_race(
    policy: Policy,
    task: Task,
    config: RunConfig,
    blocks: Sequence[int],
    folder: RunFolder,
    terminal: Terminal,
) -> Ranking:
    """Blocks by what short runs of them gained, within a budget.

    They are scored on training problems that the runs do not train on, so that the held-out ones stay unseen
    by whatever chooses the blocks.
    """
    count = _race_problems(task, config)
    rows, problems = task.train[:-count], task.train[-count:]
    trials = Trials(policy, task, config, folder, terminal, rows, problems, continued=True)
    base = trials.base()
    # Where the budget ends early, what is known of all models is that the middle is the place to look.
    order = from_the_middle(blocks, policy.num_blocks)
    total, unit = parse_budget(config.probe.budget)
    most_steps = config.training.steps
    if unit == "steps":
        budget = Budget(total, lambda: trials.spent_steps, lambda: 1.0)
    else:
        trials.run(order[0], min(FIRST_STEPS, most_steps), share=0)
        budget = Budget(
            total,
            lambda: trials.spent_s,
            lambda: trials.seconds_per_step,
            lambda: trials.seconds_per_score,
        )
    last: dict[int, Trial] = {}

    def run(block: int, steps: int, share: float) -> Scores:
        last[block] = trials.run(block, steps, share=share)
        return last[block].scores

    entrants = race(order, run, budget, most_steps=most_steps)
    found = []
    for entrant in entrants:
        trial = last[entrant.block]
        found.append(
            {
                "block": entrant.block,
                **_gains([trial], base),
                "contribution": None,
                "steps": entrant.steps,
                "problems": len(trial.greedy),
                "best_probability": entrant.best_probability,
                "among_best": entrant.among_best,
            }
        )
    trials.forget()
    return Ranking(found, _trial_settings(config, len(problems)), _cost(trials, base))


def by_sweep(
    policy: Policy,
    task: Task,
    config: RunConfig,
    blocks: Sequence[int],
    folder: RunFolder,
    terminal: Terminal,
) -> Ranking:
    """Blocks by C(k), each trained alone for all steps, beside full training, and scored on held-out problems."""
    seeds = range(config.seed, config.seed + config.probe.seeds)
    trials = Trials(policy, task, config, folder, terminal, task.train, task.held_out)
    trials.total = (1 + len(blocks)) * len(seeds)
    base = trials.base()
    steps = config.training.steps
    full: list[Trial] = []
    runs: dict[int, list[Trial]] = {block: [] for block in blocks}
    for seed in seeds:
        # The first: without a gain of full training there is nothing to compare with.
        full.append(trials.run("full", steps, seed=seed, lr=config.probe.full_lr))
        for block, own in runs.items():
            own.append(trials.run(block, steps, seed=seed))

    standing = standings({block: _scores(own) for block, own in runs.items()})
    found = {}
    for block, own in runs.items():
        row = {"block": block, **_gains(own, base), "steps": steps, **asdict(standing[block])}
        row |= _named("contribution", contribution_interval(_scores(own), base.scores, _scores(full)))
        row["greedy"] |= _named(
            "contribution", contribution_interval(_greedy(own), base.greedy, _greedy(full))
        )
        found[block] = row
    scores = {block: row["score"] for block, row in found.items()}
    extra = {
        **_cost(trials, base),
        "full": _gains(full, base),
        "position": {
            "depth": _value(depth_correlation(scores)),
            "middle": _value(middle_correlation(scores, policy.num_blocks)),
        },
    }
    shares = {block: row["contribution"] for block, row in found.items()}
    extra["plateau"] = asdict(plateau(scores if None in shares.values() else shares))
    if None in shares.values():
        gain = extra["full"]
        extra["note"] = (
            f"Full training gained {gain['score']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}), which is not "
            "clearly above zero: C(k) is a share of that gain, and is undefined. Blocks are ranked by their own."
        )
    settings = {
        **_trial_settings(config, len(task.held_out)),
        "steps": steps,
        "full_lr": config.probe.full_lr or config.training.lr,
    }
    return Ranking([found[block] for block in ranking(scores)], settings, extra)


def by_gradient(
    policy: Policy,
    task: Task,
    config: RunConfig,
    blocks: Sequence[int],
    folder: RunFolder | None,
    terminal: Terminal,
) -> Ranking:
    """The reward gradient of each block, from one set of rollouts of the untrained model; ranks are by position.

    Against four sweeps (see recipes/results) no signal ranked blocks better than closeness to the middle does.
    """
    import torch

    from midtune.probe.gradient import gradient_probe
    from midtune.probe.price import update_seconds
    from midtune.rl.algorithms import groups_per_micro_batch

    require_one_turn(task, "--method gradient")
    training = config.training
    count = min(config.probe.prompts, len(task.train))
    if count < 4:
        raise InputError(
            f"the gradient probe compares at least 4 problems, but {task.name} has {count} to train on; "
            "raise --set task.train_size, or name the blocks with --layers."
        )
    rows = random.Random(config.seed).sample(task.train, count)
    prompts = [prompt_ids(policy.tokenizer, row["prompt"]) for row in rows]
    longest = max(map(len, prompts))
    group_tokens = longest + training.group_size * training.max_new_tokens
    fitting = training.micro_batch_tokens // MEMORY_FACTOR // group_tokens
    micro_prompts = max(2, min(fitting, count // PASSES))
    passes = count // micro_prompts
    rows, prompts = rows[: passes * micro_prompts], prompts[: passes * micro_prompts]
    sample_prompts = micro_prompts * max(1, training.prompts_per_step // micro_prompts)
    typical: list[Rollout] = []

    def reward_of(rollout: Rollout, start: int) -> list[float]:
        typical[:] = [rollout]
        ids = rollout.completions()
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        repeated = [rows[start + i // rollout.group_size] for i in range(len(ids))]
        return score_completions(task.reward, repeated, texts, ids)

    meter = Meter(policy.device)
    torch.manual_seed(config.seed)
    with terminal.progress("reward gradients", len(prompts)) as advance:
        signals = gradient_probe(
            policy,
            prompts,
            reward_of,
            blocks=blocks,
            sampling=sampling_of(training),
            group_size=training.group_size,
            micro_prompts=micro_prompts,
            sample_prompts=sample_prompts,
            meter=meter,
            on_progress=advance,
        )
    phases = meter.step()
    sampling_s = (phases["rollout"] + phases["reward"]) / len(prompts)
    update_s = update_seconds(
        policy,
        typical[0],
        blocks,
        temperature=training.temperature,
        groups_per_pass=groups_per_micro_batch(
            training.prompts_per_step,
            training.group_size * (longest + training.max_new_tokens),
            training.micro_batch_tokens,
        ),
    )
    found = {
        signal.block: {
            "block": signal.block,
            "score": signal.score,
            "low": signal.low,
            "high": signal.high,
            "contribution": None,
            "step_cost": training.prompts_per_step * (sampling_s + update_s[signal.block]),
            "signals": signal.signals,
        }
        for signal in signals
    }
    settings = {**_sampling(config), "prompts": len(prompts), "passes": passes}
    note = (
        "Ranked by closeness to the middle: where blocks were trained to compare, reward gradients ranked them no "
        "better than that, and stand here as what was measured. `midtune probe` races blocks against each other."
    )
    return Ranking([found[k] for k in from_the_middle(found, policy.num_blocks)], settings, {"note": note})


def _gains(trials: Sequence[Trial], base: Trial) -> dict[str, Any]:
    """What runs gained over the base, by the scores that rank blocks and greedily, and what their steps cost."""
    # A race may score on the first of the problems only.
    count = len(trials[0].greedy)
    gain = gain_interval(_scores(trials), base.scores[:count])
    greedy = gain_interval(_greedy(trials), base.greedy[:count])
    step_s = float(np.median([trial.step_s for trial in trials]))
    steps = trials[-1].steps
    return {
        "score": gain.value,
        "low": gain.low,
        "high": gain.high,
        "step_cost": step_s,
        "gain_per_second": gain.value / (step_s * steps),
        "greedy": {"score": greedy.value, "low": greedy.low, "high": greedy.high},
    }


def _scores(trials: Sequence[Trial]) -> Scores:
    return np.stack([trial.scores for trial in trials])


def _greedy(trials: Sequence[Trial]) -> Scores:
    return np.stack([np.array(trial.greedy) for trial in trials])


def _named(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _value(correlation: Correlation | None) -> float | None:
    return None if correlation is None else correlation.value


def _cost(trials: Trials, base: Trial) -> dict[str, Any]:
    before = {"greedy": asdict(score_interval(base.greedy))}
    if base.sampled is not None:
        before["sampled"] = asdict(score_interval(base.sampled))
    return {"cost_seconds": trials.spent_s, "cost_steps": trials.spent_steps, "base": before}


def _trial_settings(config: RunConfig, problems: int) -> dict[str, Any]:
    training = config.training.model_dump(include={"lr", "algorithm", "beta", "prompts_per_step"})
    return {
        **_sampling(config),
        **training,
        "problems": problems,
        "samples": config.evaluation.samples,
        "selected_by": "greedy" if config.evaluation.samples == 0 else "sampled",
    }


def _sampling(config: RunConfig) -> dict[str, Any]:
    keys = {"group_size", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_strings"}
    return {"quantize": config.model.quantize, **config.training.model_dump(include=keys)}
