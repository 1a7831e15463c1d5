"""`midtune train`: choose blocks, train them alone, score before and after, report.

Departures from the study (arXiv 2607.01232): frozen linear layers are in 4-bit; scores are given on that
model as it trains and on the unquantized one as it will be deployed; batches are as small as one
consumer card needs. The learning rate of a single block is the study's, unless a recipe says otherwise.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from midtune.config import RunConfig, dump_config
from midtune.device import resolve_device
from midtune.errors import InputError, Interrupted
from midtune.measure.meter import Meter
from midtune.model.memory import give_back
from midtune.model.patch import apply_patch, save_patch
from midtune.model.policy import Policy, count_parameters
from midtune.model.sources import Source
from midtune.probe.selection import parse_layers
from midtune.report.plots import learning_curve
from midtune.report.statistics import compare
from midtune.report.summary import PHASES, MemoryReport, Report, TimeReport, phase_peaks
from midtune.report.terminal import Terminal
from midtune.rl.collapse import find_collapse
from midtune.rl.training import require_one_process, require_tracker, train_blocks
from midtune.rollout.evaluation import Evaluation
from midtune.rollout.vllm import require_server
from midtune.runs import RunFolder, describe_environment, run_stem
from midtune.stages.at_work import Stop, at_work
from midtune.stages.choose import choose_blocks
from midtune.stages.report import write_page
from midtune.stages.setup import (
    open_policy,
    open_source,
    open_task,
    place_embedding,
    require_one_turn,
    score_policy,
)
from midtune.stages.subprocess_job import FULL_STEPS, measure_full_training
from midtune.tasks import Task
from midtune.tasks.rewards import completion_text

# Held-out problems whose completions are kept.
SHOWN_PROBLEMS = 4
# Trained tensors in fp32 and two Adam moments, in the two checkpoints that are kept and the one being written.
CHECKPOINT_BYTES_PER_PARAMETER = 3 * 3 * 4


def run(config: RunConfig, *, out: Path | None, resume: Path | None, terminal: Terminal) -> dict[str, Any]:
    """Train, and return report.json.

    Args:
        config: of a resumed run, the one its folder holds.
        out: the run's folder; None makes one under `runs/`.
        resume: the folder of a run to go on with.

    Raises:
        InputError: anything asked for is wrong or missing; nothing has been written.
        RunStopped: there was nothing to learn from, or no room to go on.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP.
    """
    folder = (
        RunFolder.create(out, run_stem(config.model.name, config.task.name))
        if resume is None
        else RunFolder.open(resume)
    )
    if resume is not None and not folder.is_training:
        raise InputError(
            f"{folder} was made by `midtune probe`, not by `midtune train`; go on with "
            f"`midtune probe --resume {folder}`."
        )
    with at_work(folder, "train") as stop:
        return _run(config, folder, resume is not None, stop, terminal)


def _run(
    config: RunConfig, folder: RunFolder, resumed: bool, stop: Stop, terminal: Terminal
) -> dict[str, Any]:
    if resumed and not folder.start.is_file():
        raise InputError(
            f"{folder} lacks start.json, which says how it began; restore it, or start again with another --out."
        )
    checkpoint = folder.latest_checkpoint(terminal.message) if resumed else None
    if checkpoint is not None:
        step = int(checkpoint.name.rpartition("-")[2])
        _rewind(folder, step, terminal)
        terminal.message(f"resuming {folder} after step {step}")
    elif resumed:
        folder.truncate_metrics(0)
        terminal.message(f"{folder} has no checkpoint yet; beginning with its first step")

    if config.blocks.select == "boost":
        if config.model.adapter == "lora":
            raise InputError("--select boost trains all blocks whole; leave out --adapter lora.")
        # Every block is trained, so none is left to keep in 4-bit.
        unquantized = config.model.model_copy(update={"quantize": "none"})
        config = config.model_copy(update={"model": unquantized})
    require_one_process()
    require_tracker(config.training.report_to)
    task = open_task(config, terminal)
    if config.evaluation.baseline == "measured":
        require_one_turn(task, "--baseline measured")
    source = open_source(config, terminal)
    if config.training.vllm is not None:
        require_server(config.training.vllm, source.folder)
    meter = Meter(resolve_device(config.model.device))
    # On a CPU peaks count the whole process, so full training's estimate has to begin there too.
    process_bytes = meter.current_bytes()
    policy = open_policy(config, source, terminal)
    if policy.stored_quantized:
        terminal.message(
            f"{source.name} is stored in 4-bit: the trained block starts from dequantized weights."
        )
        if config.training.vllm is not None:
            raise InputError(
                f"{source.name} is stored in 4-bit, so a vLLM server cannot be sent its trained block; leave "
                "training.vllm out, or use the unquantized checkpoint."
            )
    config, choice, ranking = choose_blocks(config, policy, task, terminal)
    chosen = parse_layers(config.blocks.layers or "", policy.num_blocks, config.blocks.top_k)
    if config.training.fit is not None:
        from midtune.planning.search import fitted

        config = fitted(config, policy, task, chosen, process_bytes, terminal.message)
    place_embedding(config, policy)
    policy.unpack = config.model.unpack == "auto"
    policy.sampling_rows.rows = config.training.sampled_prompts * config.training.group_size or None
    boosted = config.blocks.select == "boost"
    blocks = list(range(policy.num_blocks)) if boosted else chosen

    if not resumed:
        trained = len(blocks) * count_parameters(policy.blocks[blocks[0]])
        folder.require_free(trained * CHECKPOINT_BYTES_PER_PARAMETER)
        folder.write_json(folder.environment, describe_environment(policy.computes, config.seed))
        folder.write_json(folder.start, {"choice": choice, "ranking": ranking})
        # From here on there is something to resume.
        folder.write_config(dump_config(config))
    known = folder.read_json(folder.start)
    choice = known["choice"]
    if "greedy" in known:
        before = _scores_of(known)
    else:
        before = score_policy(
            policy,
            task,
            task.held_out,
            config,
            terminal,
            "scoring before training",
            config.evaluation.samples,
        )
        _write_start(folder, before, choice, known["ranking"])

    if config.model.adapter == "lora":
        policy.add_lora(blocks, config.model.lora_rank)
    else:
        for block in blocks:
            policy.thaw(block)
    trainable = sum(p.numel() for p in policy.trained_parameters().values())
    faster = dict.fromkeys(chosen, config.blocks.boost) if boosted else {}
    peak_bytes = _train(config, policy, task, folder, checkpoint, meter, faster, stop, terminal)

    after = score_policy(
        policy, task, task.held_out, config, terminal, "scoring after training", config.evaluation.samples
    )
    patch_bytes = save_patch(policy, folder.patch)
    _write_before_after(folder, task, before, after)
    steps = folder.read_metrics()
    time = _time(config, steps)
    estimates = _estimates(config, policy, task, steps, time, process_bytes)
    total_parameters, stored_quantized = policy.total_parameters, policy.stored_quantized
    del policy
    give_back()

    deployed = None
    if config.evaluation.deployed and not stored_quantized:
        deployed = _score_deployed(config, source, task, folder, terminal)
    if config.evaluation.baseline == "measured":
        terminal.message(f"measuring full training: {FULL_STEPS} steps in a process of its own")
        full = measure_full_training(folder.config)
    else:
        full = estimates["trl-full"]
    qlora = estimates["trl-qlora"]
    unknown = [found["note"] for found in estimates.values() if found["note"]]
    for note in unknown:
        terminal.message(note)

    phases = phase_peaks(steps)
    report = Report(
        model=source.name,
        task=task.name,
        blocks=tuple(blocks),
        quality=compare(before.greedy, after.greedy),
        sampled=(
            compare(before.sampled, after.sampled)
            if before.sampled is not None and after.sampled is not None
            else None
        ),
        deployed=compare(deployed[0].greedy, deployed[1].greedy) if deployed else None,
        time=TimeReport(
            **time,
            full_step=full["step"],
            full_source=config.evaluation.baseline,
            full_tokens=full.get("completion_length"),
            full_phases=full["phases"],
            qlora_step=qlora["step"],
            qlora_phases=qlora["phases"],
        ),
        memory=MemoryReport(
            # The steps of a resumed run know of the processes before.
            peak=max([peak_bytes, *phases.values()]),
            source=meter.source,
            full_peak=full["peak"],
            full_source=config.evaluation.baseline,
            qlora_peak=qlora["peak"],
            phases=phases or None,
            reserved=max(phase_peaks(steps, "reserved_bytes").values(), default=None),
        ),
        trainable_parameters=trainable,
        total_parameters=total_parameters,
        patch_bytes=patch_bytes,
        probe=choice,
        seed=config.seed,
        notes=(*_notes(steps), *unknown),
    ).to_dict()
    folder.write_json(folder.report, report)
    _draw(folder, steps, report, terminal)
    terminal.message(f"run folder: {folder}")
    return {**report, "run": str(folder)}


def _estimates(
    config: RunConfig,
    policy: Policy,
    task: Task,
    steps: list[dict[str, Any]],
    time: dict[str, Any],
    process_bytes: int,
) -> dict[str, dict[str, Any]]:
    """What is not measured: QLoRA, and full training but where it is."""
    from midtune.planning.estimate import estimated

    arms = ("trl-qlora",) if config.evaluation.baseline == "measured" else ("trl-full", "trl-qlora")
    measured = time.get("compared_phases") or time
    return {
        arm: estimated(arm, config, policy, task, steps, measured=measured, process_bytes=process_bytes)
        for arm in arms
    }


def _notes(steps: list[dict[str, Any]]) -> tuple[str, ...]:
    """What the report says beside its figures."""
    known = [step for step in steps if step["reward"] is not None]
    found = find_collapse([step["reward"] for step in known], [step["equal_groups"] for step in known])
    said = str(found or "")
    return (f"{said[:1].upper()}{said[1:]}.",) if said else ()


def _train(
    config: RunConfig,
    policy: Policy,
    task: Task,
    folder: RunFolder,
    checkpoint: Path | None,
    meter: Meter,
    faster: dict[int, float],
    stop: Stop,
    terminal: Terminal,
) -> int:
    """The training itself; returns its peak bytes."""
    # What scoring has left behind is no part of it.
    give_back()
    meter.reset_peak()
    title = f"{policy.source.name}, {task.name}, blocks {', '.join(map(str, policy.trained))}"
    # Where memory ran out before, what fitted then is where a resumed run starts.
    last_step = (folder.read_metrics() or [{}])[-1]
    policy.sampling_rows.rows = last_step.get("sampling_rows", policy.sampling_rows.rows)
    with stop.after_the_step(), terminal.training(config.training.steps, title) as display:

        def on_step(metrics: dict[str, Any]) -> None:
            folder.append_jsonl(folder.metrics, metrics)
            display.update(metrics)
            if stop.asked and not stop.said:
                stop.said = True
                display.message("stopping after this step; its checkpoint is being saved")

        last = train_blocks(
            policy,
            task.train,
            task.reward,
            config.training,
            folder=folder.checkpoints,
            seed=config.seed,
            meter=meter,
            faster=faster,
            on_step=on_step,
            on_sample=lambda sample: folder.append_jsonl(folder.samples, sample),
            on_message=display.message,
            stop_requested=lambda: stop.asked,
            resume_from=checkpoint,
            update_rows=last_step.get("update_rows"),
            game=task.game,
        )
    if stop.asked:
        raise Interrupted(
            f"stopped after step {last} of {config.training.steps}; go on with `midtune train --resume {folder}`."
        )
    return meter.peak_bytes()


def _score_deployed(
    config: RunConfig, source: Source, task: Task, folder: RunFolder, terminal: Terminal
) -> tuple[Evaluation, Evaluation]:
    """Greedy scores of the unquantized model without and with the patch that was written."""
    policy = open_policy(config, source, terminal, quantize="none")
    before = score_policy(policy, task, task.held_out, config, terminal, "scoring the unquantized model", 0)
    apply_patch(policy, folder.patch)
    after = score_policy(policy, task, task.held_out, config, terminal, "scoring it with the patch", 0)
    del policy
    give_back()
    return before, after


def _time(config: RunConfig, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean seconds of a step and its phases, and those of the steps that the baseline repeats."""
    means: dict[str, Any] = {
        name: statistics.fmean(step[f"{name}_s"] for step in steps) for name in ("step", *PHASES)
    }
    if config.evaluation.baseline == "measured":
        # The fastest, as for full training: the first step also warms up.
        first = steps[:FULL_STEPS]
        fastest = min(first, key=lambda step: step["step_s"])
        means["compared_step"] = fastest["step_s"]
        means["compared_phases"] = {name: fastest[f"{name}_s"] for name in PHASES}
        means["compared_tokens"] = statistics.fmean(step["completion_length"] for step in first)
    return means


def _rewind(folder: RunFolder, step: int, terminal: Terminal) -> None:
    """Go back to what was known after `step`, and say what is not known any more."""
    missing = folder.truncate_metrics(step)
    if len(missing) == step:
        raise InputError(
            f"metrics.jsonl in {folder} has none of its {step} steps, whose times the report needs; restore it, or "
            "start the run again with another --out."
        )
    if missing:
        terminal.message(
            f"metrics.jsonl in {folder} was damaged and lost steps {', '.join(map(str, missing))}; the report goes "
            "without them"
        )


def _write_start(folder: RunFolder, before: Evaluation, choice: str, ranking: Path | str | None) -> None:
    folder.write_json(
        folder.start,
        {
            "choice": choice,
            "ranking": ranking,
            "completions": before.completions[:SHOWN_PROBLEMS],
            "greedy": before.greedy.tolist(),
            "sampled": None if before.sampled is None else before.sampled.tolist(),
        },
    )


def _scores_of(data: dict[str, Any]) -> Evaluation:
    """The scores in start.json."""
    import numpy as np

    sampled = None if data["sampled"] is None else np.array(data["sampled"])
    return Evaluation(np.array(data["greedy"]), sampled, data.get("completions", []))


def _write_before_after(folder: RunFolder, task: Task, before: Evaluation, after: Evaluation) -> None:
    """Keep the greedy completions of the first held-out problems, whatever became of them."""
    problems = [
        {
            # What an environment shows first is in the question.
            "prompt": completion_text(row["prompt"]) if task.game is None else row["question"],
            "answer": row.get("answer"),
            "before": {"completion": was, "score": before.greedy[place]},
            "after": {"completion": after.completions[place], "score": after.greedy[place]},
        }
        for place, (row, was) in enumerate(
            zip(task.held_out, before.completions[:SHOWN_PROBLEMS], strict=False)
        )
    ]
    folder.write_json(folder.before_after, {"problems": problems})


def _draw(folder: RunFolder, steps: list[dict[str, Any]], report: dict[str, Any], terminal: Terminal) -> None:
    try:
        learning_curve(steps, report, folder.curve)
        write_page(folder)
        terminal.message(f"report page: {folder}/{folder.page.name}")
    except Exception as error:  # noqa: BLE001 (the run is complete without its pictures)
        terminal.message(
            f"the run is complete, but its pictures failed ({type(error).__name__}: {error}); "
            f"try again with `midtune report {folder}`"
        )
