"""`midtune bench --until`: whole training runs of midtune and TRL on one task, their scores against the clock.

Each run has a process of its own and leaves a file, so that the same command goes on where it stopped. Scoring takes
no time on the clock. An arm is scored as it trains: where its frozen blocks are in 4-bit, on the 4-bit model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from midtune.bench.workload import ARMS
from midtune.config import MOST_STEPS, RunConfig, with_settings
from midtune.device import compute_dtype, resolve_device
from midtune.errors import InputError, MidtuneError
from midtune.model.configs import read_config
from midtune.probe.selection import middle, parse_layers
from midtune.report.formats import interval_texts, seconds_text, with_interval
from midtune.report.plots import clock_curve
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder, describe_environment
from midtune.stages.opening import Opened
from midtune.stages.subprocess_job import in_own_process, say

SPAN = "midtune-span"
# Between neighbouring learning rates; and rates to start from where the configuration has none: of blocks or adapters,
# and how much less suits training all parameters.
RATE_FACTOR, RATE, FULL_RATE_SHARE = 3.0, 1e-4, 0.1
# Scorings of an arm, and problems scored where the configuration leaves it open.
SCORINGS, PROBLEMS = 6, 100


def run(
    config: RunConfig,
    *,
    until: str,
    arms: Sequence[str],
    rates: int,
    every: int | None,
    out: Path | None,
    terminal: Terminal,
) -> dict[str, Any]:
    """Train the arms, each at several learning rates, and compare the best run of each; writes learning.json and .svg.

    `until` is for `parse_until`. With a score, an arm ends when a scoring has reached it, or after `training.steps`.

    Returns:
        `target`: the score to reach, as given or full training's last (null without); `equal_time`: the seconds of the
        arm that ended first. `arms`: each with `points` (see `Curve`), `lr`, `tried` (rate → last score), `reached`
        (the first point at the target or null), `at_equal_time` (the last point until then), `peak`, `libraries`,
        `trainable` and `blocks`. `failed`: arm → why.

    Raises InputError if the arms, the task or the model cannot be had; nothing has been written.
    """
    steps, score = parse_until(until)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise InputError(f"arm {unknown[0]} is not known; choose among {', '.join(ARMS)}.")
    config = with_settings(config, {"training.steps": steps or config.training.steps})
    opened = Opened(config, terminal)
    opened.task.require_one_turn("`bench --until`")
    source, problems = opened.source, len(opened.task.held_out)
    depth = read_config(source.folder, source.name).get_text_config().num_hidden_layers
    # What is the same for all runs; blocks are named apart, so that a longer span leaves finished runs as they are.
    known = {"model.revision": source.revision, "blocks.layers": None, "blocks.top_k": 1}
    same = {
        "config": with_settings(config, known).model_dump(mode="json"),
        "problems": min(problems, PROBLEMS) if config.task.eval_size == "auto" else problems,
        "every": every or max(1, config.training.steps // SCORINGS),
        "target": score,
    }
    jobs: list[dict[str, Any]] = [
        {"arm": arm, "blocks": blocks, "lr": lr, **same}
        for arm, blocks in blocks_of(config, arms, depth).items()
        for lr in rates_of(arm, config, rates)
    ]
    resumed = out is not None and (out / "arms").is_dir()
    folder = RunFolder(out.absolute()) if resumed and out else RunFolder.create(out, f"until-{source.name}")
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    with folder.locked(), terminal.progress("runs", len(jobs)) as advance:
        folder.make()
        (folder.path / "arms").mkdir(exist_ok=True)
        terminal.message(
            f"{len(jobs)} runs; the same command with --out {folder} goes on where this one stops"
        )
        for job in jobs:
            name = f"{job['arm']}-{job['lr'] if isinstance(job['lr'], str) else format(job['lr'], '.3g')}"
            try:
                found.setdefault(job["arm"], []).append(_learned(folder, name, job, terminal))
            except MidtuneError as error:
                terminal.message(str(error))
                failed[name] = str(error)
            advance(1)
        result = {
            "schema": 1,
            "model": source.name,
            "task": opened.task.name,
            "problems": same["problems"],
            "steps": config.training.steps,
            "until": until,
            **compared(found, score),
            "failed": failed,
            "environment": describe_environment(config.model.device, config.seed),
        }
        folder.write_json(folder.path / "learning.json", result)
        clock_curve(result, folder.path / "learning.svg")
    return {**result, "run": str(folder)}


def parse_until(text: str) -> tuple[int | None, float | None]:
    """`60` as steps, `0.45` or `45%` as a score; raises InputError if it is neither."""
    text = text.strip()
    if re.fullmatch(r"\d{1,7}", text) and 1 <= int(text) <= MOST_STEPS:
        return int(text), None
    match = re.fullmatch(r"(0?\.\d+)|(\d{1,2}(?:\.\d+)?|100)%", text)
    score = float(match[1] or float(match[2]) / 100) if match else 0.0
    if score <= 0:
        raise InputError(
            f"--until {text} is neither steps nor a score; write a number of steps such as 60, or a score such as 0.45 "
            "or 45%."
        )
    return None, score


def blocks_of(config: RunConfig, arms: Sequence[str], depth: int) -> dict[str, list[int]]:
    """Arm → the blocks it trains. Beside `midtune`, which trains one, comes the span of `blocks.top_k`, if longer."""
    layers = config.blocks.layers or "middle"
    one = parse_layers(layers, depth)
    if len(one) != 1:
        raise InputError(f"--layers {layers} names {len(one)} blocks, but an arm trains one; name one.")
    chosen: dict[str, list[int]] = {}
    for arm in arms:
        chosen[arm] = one if ARMS[arm].trains == "blocks" else []
        if arm == "midtune" and config.blocks.top_k > 1:
            chosen[SPAN] = middle(depth, config.blocks.top_k)
    return chosen


def rates_of(arm: str, config: RunConfig, count: int) -> list[float | str]:
    """Learning rates to try, around `training.lr`; full training's are around `probe.full_lr`, or a tenth of that."""
    lr: Any = config.training.lr
    if lr == "auto" and arm.startswith("midtune"):
        return [lr]
    centre = RATE if lr == "auto" else lr
    if arm in ARMS and ARMS[arm].trains == "all":
        centre = config.probe.full_lr or FULL_RATE_SHARE * centre
    return [centre * RATE_FACTOR**place for place in range(-(count // 2), count - count // 2)]


def compared(found: Mapping[str, Sequence[Mapping[str, Any]]], score: float | None) -> dict[str, Any]:
    """The best run of each arm, and all of them at the target and at the same time; see `run`.

    The best has the highest last score; where all were to reach a given one, it was the first to.
    """

    def reached(one: Mapping[str, Any], target: float | None) -> Mapping[str, Any] | None:
        return None if target is None else next((p for p in one["points"] if p["score"] >= target), None)

    def worth(one: Mapping[str, Any]) -> tuple[float, float]:
        first = reached(one, score)
        return (-first["seconds"] if first else float("-inf")), one["points"][-1]["score"]

    best = {arm: max(runs, key=worth) for arm, runs in found.items() if runs}
    full = best.get("trl-full")
    target = score if score is not None or full is None else full["points"][-1]["score"]
    equal_time = min((one["points"][-1]["seconds"] for one in best.values()), default=None)
    return {
        "target": target,
        "equal_time": equal_time,
        "arms": [
            {
                **one,
                "tried": [{"lr": other["lr"], "score": other["points"][-1]["score"]} for other in found[arm]],
                "reached": reached(one, target),
                "at_equal_time": [p for p in one["points"] if p["seconds"] <= equal_time][-1],
            }
            for arm, one in best.items()
        ],
    }


def _learned(folder: RunFolder, name: str, job: dict[str, Any], terminal: Terminal) -> dict[str, Any]:
    """A run's figures, from its file if the same run has left one, else from a process of its own."""
    file = folder.path / "arms" / f"{name}.json"
    with suppress(InputError):
        known = folder.read_json(file)
        if known.pop("job", None) == job:
            terminal.message(f"{name}: known from {file.name}")
            return known
    terminal.message(f"{name}: training")
    entry = f"{__name__}:{learn_alone.__name__}"
    found = in_own_process(
        entry,
        job,
        what=f"the run {name}",
        instead="leave its arm out with --arms",
        on_message=lambda text: terminal.message(f"{name}: {text}"),
    )
    folder.write_json(file, {**found, "job": job})
    return found


def learn_alone(
    arm: str,
    blocks: list[int],
    lr: Any,
    config: dict[str, Any],
    problems: int,
    every: int,
    target: float | None,
) -> dict[str, Any]:
    """Train an arm at one learning rate in this process; see `bench.arms.learn`."""
    from midtune.bench.arms import learn
    from midtune.bench.curve import Curve
    from midtune.measure.meter import Meter
    from midtune.rollout.sampling import SamplingLimits
    from midtune.rollout.text import TextSampler

    settings = RunConfig.model_validate(config)
    opened, device = Opened(settings, Terminal(quiet=True)), resolve_device(settings.model.device)
    opened.score_first(problems)
    task = opened.task

    def score(policy: Any, of_base: bool) -> Any:
        return opened.score(TextSampler(policy, SamplingLimits()), "scoring", of_base=of_base).scores

    # An arm without a signal goes on like the others.
    changes = {"lr": lr, "report_to": "none", "stop_after_equal_rewards": 0}
    training = settings.training.model_copy(update=changes)

    def point(found: dict[str, Any]) -> None:
        score = with_interval(*interval_texts(found, fractions=True))
        say(f"{score} after {found['step']} of {training.steps} steps, {seconds_text(found['seconds'])}")

    drawn = training.prompts_per_step * training.group_size
    found = learn(
        "midtune" if arm == SPAN else arm,
        opened.source,
        task.train,
        task.reward,
        training,
        blocks,
        Curve(score, Meter(device), training.steps, every, drawn, target, point),
        device=device,
        quantize=settings.model.quantize,
        seed=settings.seed,
        dtype=compute_dtype(settings.model.dtype, device),
    )
    return {"arm": arm, "lr": lr, "blocks": blocks, **found}
