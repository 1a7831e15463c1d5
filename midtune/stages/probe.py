"""Ranks blocks: by the reward gradient of each, or by short runs that train one block each."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midtune.config import RunConfig, dump_config
from midtune.errors import InputError
from midtune.probe.selection import best, middle, parse_layers
from midtune.report.terminal import Terminal
from midtune.rollout.evaluation import prompt_ids, score_completions
from midtune.runs import RunFolder, describe_environment
from midtune.savings.meter import Meter
from midtune.stages.setup import open_policy, open_source, open_task, sampling_of, score_policy
from midtune.tasks import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from midtune.model.policy import Policy
    from midtune.rollout.sampler import Rollout

# A pass over all blocks keeps the inputs and output gradients of every linear layer: 2.3 times the memory of
# updating the middle block on the same tokens, where it was measured.
MEMORY_FACTOR = 3
# Enough for an interval over passes; fewer, larger passes compare more prompts with each other.
PASSES = 8


@dataclass(frozen=True)
class Ranked:
    """A block's line in probe.json, before ranks are given."""

    block: int
    score: float
    low: float
    high: float
    step_cost: float
    extra: dict[str, float]


def run(config: RunConfig, *, out: Path | None, terminal: Terminal) -> dict[str, Any]:
    """Rank the blocks of a model on a task and write probe.json into a run folder of its own.

    Returns:
        What probe.json holds; see `probe_blocks`.

    Raises:
        InputError: something asked for does not exist; nothing has been written.
        RunStopped: the rewards do not tell completions apart.
    """
    task = open_task(config, terminal)
    model_name = Path(config.model.name).name
    folder = RunFolder.create(out, f"probe-{model_name}-{Path(task.name.rpartition(':')[2]).stem}")
    policy = open_policy(config, open_source(config, terminal), terminal)
    blocks = (
        parse_layers(config.probe.layers, policy.num_blocks, config.blocks.top_k)
        if config.probe.layers is not None
        else list(range(policy.num_blocks))
    )
    probe = probe_blocks(policy, task, config, blocks, terminal)
    folder.write_text(folder.config, dump_config(config))
    folder.write_json(folder.environment, describe_environment(str(policy.device), config.seed))
    folder.write_json(folder.probe, probe)
    return probe


def probe_blocks(
    policy: Policy, task: Task, config: RunConfig, blocks: Sequence[int], terminal: Terminal
) -> dict[str, Any]:
    """Rank `blocks` as `config.probe` says; the policy and torch's random state are as they were afterwards.

    `score`, `low` and `high` are, by the method `gradient`, the unbiased squared norm of the block's reward
    gradient (see `midtune.probe.gradient` for what that is worth) and, by the method `trial`, the gain of a
    short run on held-out problems. `step_cost` is seconds of a training step: by `trial` measured; by
    `gradient` the measured time of sampling and rewards, plus an update that is measured at the lowest,
    middle and highest block and interpolated between them. The geometric middle block is measured in any
    case, as what a ranking has to beat.

    Args:
        policy: with no trained blocks.
        blocks: block numbers, at least `config.blocks.top_k` of them.

    Returns:
        What probe.json holds. `contribution` is null: it takes a full training run to know.

    Raises:
        InputError: more blocks are to be selected than ranked, or the task has too few problems.
        RunStopped: the rewards do not tell completions apart.
    """
    import torch

    assert not policy.trained, f"blocks {policy.trained} are being trained, and a probe would drop them"
    best(blocks, policy.num_blocks, config.blocks.top_k)
    baseline = middle(policy.num_blocks, 1)[0]
    measured = sorted({*blocks, baseline})
    started = time.perf_counter()
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        method = by_trials if config.probe.method == "trial" else by_gradient
        found, settings = method(policy, task, config, measured, terminal)
    seconds = time.perf_counter() - started

    # Equal scores go to the deeper block, whose updates are cheaper.
    asked = sorted((row for row in found if row.block in blocks), key=lambda row: (-row.score, -row.block))
    ranks = {row.block: rank for rank, row in enumerate(asked, 1)}
    return {
        "schema": 1,
        "model": policy.source.name,
        "revision": policy.source.revision,
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "method": config.probe.method,
        "seed": config.seed,
        "settings": settings,
        "cost_seconds": seconds,
        "blocks": [
            {
                "block": row.block,
                "score": row.score,
                "low": row.low,
                "high": row.high,
                "contribution": None,
                "step_cost": row.step_cost,
                "rank": ranks[row.block],
                **row.extra,
            }
            for row in sorted(asked, key=lambda row: row.block)
        ],
        "selected": best([row.block for row in asked], policy.num_blocks, config.blocks.top_k),
        "depth_baseline": {
            "block": baseline,
            "score": next(row.score for row in found if row.block == baseline),
        },
    }


def by_gradient(
    policy: Policy, task: Task, config: RunConfig, blocks: Sequence[int], terminal: Terminal
) -> tuple[list[Ranked], dict[str, Any]]:
    """One line per block from reward gradients, and the settings that shaped them."""
    import torch

    from midtune.probe.gradient import gradient_probe
    from midtune.probe.trials import update_seconds
    from midtune.rl.algorithms import groups_per_micro_batch

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
    found = [
        Ranked(
            signal.block,
            signal.score,
            signal.low,
            signal.high,
            training.prompts_per_step * (sampling_s + update_s[signal.block]),
            {"signal_share": signal.signal_share, "norm": signal.norm},
        )
        for signal in signals
    ]
    return found, {**_sampling(config), "prompts": len(prompts), "passes": passes}


def by_trials(
    policy: Policy, task: Task, config: RunConfig, blocks: Sequence[int], terminal: Terminal
) -> tuple[list[Ranked], dict[str, Any]]:
    """One line per block from short runs of whole blocks, and the settings that shaped them.

    Scores are means over samples at the training temperature, where a short run shows first; greedy ones
    where no samples are configured.
    """
    from midtune.probe.trials import single_block_trials
    from midtune.report.statistics import paired_gain
    from midtune.rl.training import train_blocks

    steps = config.probe.trial_steps
    settings = config.training.model_copy(update={"steps": steps, "report_to": "none"})
    total = len(blocks)
    done: list[int] = []

    def train(policy: Policy, seed: int) -> float:
        seconds: list[float] = []
        title = f"trial {len(done) + 1} of {total}: block {policy.trained[0]}"
        done.append(policy.trained[0])
        with terminal.progress(title, steps) as advance, tempfile.TemporaryDirectory() as scratch:

            def on_step(metrics: dict[str, Any]) -> None:
                seconds.append(metrics["step_s"])
                advance(1)

            train_blocks(
                policy,
                task.train,
                task.reward,
                settings,
                folder=Path(scratch),
                seed=seed,
                meter=Meter(policy.device),
                on_step=on_step,
                checkpoints=False,
            )
        return statistics.median(seconds)

    def evaluate(policy: Policy) -> NDArray[np.float64]:
        what = f"scoring block {policy.trained[0]}" if policy.trained else "scoring before training"
        evaluation = score_policy(
            policy, task, task.held_out, config, terminal, what, config.evaluation.samples
        )
        return evaluation.greedy if evaluation.sampled is None else evaluation.sampled

    base, trials = single_block_trials(policy, blocks, train=train, evaluate=evaluate, seed=config.seed)
    found = []
    for trial in trials:
        gain = paired_gain(base, trial.scores)
        found.append(Ranked(trial.block, gain.value, gain.low, gain.high, trial.step_seconds, {}))
    return found, {
        **_sampling(config),
        "trial_steps": steps,
        "lr": settings.lr,
        "algorithm": settings.algorithm,
        "prompts_per_step": settings.prompts_per_step,
        "problems": len(task.held_out),
        "samples": config.evaluation.samples,
    }


def _sampling(config: RunConfig) -> dict[str, Any]:
    keys = {"group_size", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_strings"}
    return {"quantize": config.model.quantize, **config.training.model_dump(include=keys)}
