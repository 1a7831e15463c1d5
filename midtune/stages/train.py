"""`midtune train`: choose blocks, train only them, score before and after, report.

Departures from the study (arXiv 2607.01232): frozen linear layers are in 4-bit; scores are given for that model
and for the unquantized one that will be deployed; batches fit one consumer card. The learning rate follows a trust
region (`rl.trust_region`), unless a recipe names one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midtune import processes
from midtune.config import RunConfig, dump_config, with_settings
from midtune.device import resolve_device
from midtune.errors import InputError, Interrupted
from midtune.measure.meter import Meter
from midtune.model.host import embed_on_host
from midtune.model.memory import give_back
from midtune.model.patch import apply_patch, save_patch, tensors_in
from midtune.model.policy import Policy, count_parameters
from midtune.planning.scoring import ScoringPlan, plan_scoring
from midtune.report import summary
from midtune.report.formats import numbers_text, sentence
from midtune.report.page import run_page
from midtune.report.plots import learning_curve
from midtune.report.terminal import Terminal
from midtune.rl.collapse import collapse_in
from midtune.rl.tail import tail_note
from midtune.rl.training import require_tracker, train_blocks
from midtune.rollout.evaluation import Evaluation
from midtune.rollout.sampling import Sampler
from midtune.rollout.vllm import require_servers
from midtune.runs import CHECKPOINT_BYTES_PER_PARAMETER, RunFolder, run_stem
from midtune.stages.at_work import Stop, at_work
from midtune.stages.opening import Choice, Opened, choose_blocks
from midtune.stages.report import read_run
from midtune.stages.subprocess_job import FULL_STEPS, in_own_process
from midtune.tasks import Task
from midtune.tasks.rewards import completion_text

# Held-out problems whose completions are saved.
SHOWN_PROBLEMS = 4
SHARED = (
    "{} processes shared each step. Full training's figures are for the prompts of one of them, without sending its "
    "gradients."
)
KEPT = "Scores of the base model are those that an earlier run with the same settings took."


@dataclass
class Training:
    """A run with its model loaded and its blocks chosen.

    `opened.config` includes the blocks and the changes of `--fit`. `blocks` are all of them with `boost`, else
    `choice.blocks`. `process_bytes` is resident memory before the model was loaded.
    """

    folder: RunFolder
    opened: Opened
    sampler: Sampler
    choice: Choice
    blocks: list[int]
    meter: Meter
    process_bytes: int
    scoring: ScoringPlan

    @property
    def policy(self) -> Policy:
        return self.sampler.policy

    def thaw(self) -> None:
        model = self.opened.config.model
        if model.adapter == "lora":
            self.policy.add_lora(self.blocks, model.lora_rank)
        else:
            for block in self.blocks:
                self.policy.thaw(block)


def run(config: RunConfig, *, out: Path | None, resume: Path | None, terminal: Terminal) -> dict[str, Any]:
    """Train, and return report.json.

    When resuming, `config` is the one in the folder. Without `out`, the folder is made under `runs/`. Several processes
    share prompts and problems; the main one writes, prints and returns the report, and the others return nothing.

    Raises:
        InputError: something asked for is wrong or missing; nothing has been written.
        RunStopped: there was nothing to learn from, or disk or memory ran out.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP.
    """
    with processes.together(lambda: resolve_device(config.model.device).type == "cpu"):
        return _run(config, out, resume, terminal if processes.is_main() else Terminal(quiet=True))


def _run(config: RunConfig, out: Path | None, resume: Path | None, terminal: Terminal) -> dict[str, Any]:
    stem = run_stem(config.model.name, config.task.name)
    folder = processes.from_main(
        lambda: RunFolder.create(out, stem) if resume is None else RunFolder.resumed(resume, "train")
    )
    folder.writes = processes.is_main()
    with at_work(folder, "train") as stop:
        checkpoint = processes.from_main(
            lambda: _checkpoint(folder, terminal) if resume is not None else None
        )
        training = _open(_checked(config), folder, terminal)
        if resume is None:
            processes.from_main(lambda: _begin(training))
        before = _score_before(training)
        training.thaw()
        peak_bytes = _train(training, checkpoint, stop)
        patch_bytes = processes.from_main(lambda: save_patch(training.policy, folder.patch))
        if training.policy.adapter is None:
            # What is scored is what was saved, in the checkpoint's dtype.
            training.policy.load_blocks(tensors_in(folder.patch))
        after = training.opened.score(training.sampler, "scoring after training")
        _write_before_after(folder, training.opened.task, before, after)
        report = _report(training, before, after, peak_bytes, patch_bytes)
        if not processes.is_main():
            return report
        folder.write_json(folder.report, report)
        _draw(folder, report, terminal)
        terminal.message(f"run folder: {folder}")
        return {**report, "run": str(folder)}


def _checkpoint(folder: RunFolder, terminal: Terminal) -> Path | None:
    """The checkpoint to resume from, if any; metrics of later steps are dropped."""
    if not folder.start.is_file():
        raise InputError(
            f"{folder} lacks start.json, which says how it began; restore it, or start again with another --out."
        )
    checkpoint, step, missing = folder.rewind(terminal.message)
    if checkpoint is None:
        terminal.message(f"{folder} has no checkpoint yet; beginning with its first step")
        return None
    if len(missing) == step:
        raise InputError(
            f"metrics.jsonl in {folder} has none of its {step} steps, whose times the report needs; restore it, or "
            "start the run again with another --out."
        )
    if missing:
        terminal.message(
            f"metrics.jsonl in {folder} was damaged and lost steps {numbers_text(missing)}; the report goes "
            "without them"
        )
    terminal.message(f"resuming {folder} after step {step}")
    return checkpoint


def _checked(config: RunConfig) -> RunConfig:
    """Check that the run is possible here; with `boost`, return the configuration unquantized."""
    processes.even_share(config.training.prompts_per_step)
    if config.training.vllm and processes.count() > 1:
        raise InputError(
            f"vLLM servers sample for one process, and {processes.count()} share this run; leave out --devices or "
            "training.vllm."
        )
    require_tracker(config.training.report_to)
    if config.model.rounding == "calibrated" and config.model.quantize == "none":
        raise InputError("--quantize none puts nothing into 4-bit; leave out model.rounding=calibrated.")
    if config.blocks.select != "boost":
        return config
    if config.model.adapter == "lora":
        raise InputError("--select boost trains all blocks whole; leave out --adapter lora.")
    # Every block is trained, so none can be in 4-bit.
    return with_settings(config, {"model.quantize": "none"})


def _open(config: RunConfig, folder: RunFolder, terminal: Terminal) -> Training:
    opened = Opened(config, terminal)
    with processes.main_first():
        # What has to be downloaded or converted, the main process does.
        source, held_out = opened.source, opened.task.held_out
    plan = plan_scoring(config, len(held_out))
    terminal.message(str(plan))
    opened.score_first(plan.problems)
    task = opened.task
    if config.evaluation.baseline == "measured":
        task.require_one_turn("--baseline measured")
    if config.training.vllm:
        require_servers(config.training.vllm, source.folder)
    meter = Meter(resolve_device(config.model.device))
    # What is left of earlier work in this process does not count.
    give_back()
    # On a CPU peaks count the whole process, so full training's estimate has to begin there too.
    process_bytes = meter.current_bytes()
    policy = opened.policy(embeddings="device")
    if policy.stored_quantized:
        name = source.name
        terminal.message(f"{name} is stored in 4-bit: the trained block starts from dequantized weights.")
        if config.training.vllm:
            raise InputError(
                f"{name} is stored in 4-bit, so a vLLM server cannot be sent its trained block; leave training.vllm "
                "out, or use the unquantized checkpoint."
            )
    choice = choose_blocks(config.blocks, policy, task, terminal)
    # Named, so that the saved configuration repeats this run.
    layers = ",".join(map(str, choice.blocks))
    named: dict[str, Any] = {
        "blocks.layers": layers,
        "blocks.top_k": len(choice.blocks),
        "blocks.probe": None,
    }
    if task.game is not None:
        # What an episode begins with is known when it begins.
        named["training.prompts"] = "uniform"
    config = with_settings(config, named)
    sampler = opened.sampler(policy)
    # On a CPU memory is the whole machine's, and the system's to share out.
    needless = ("none", None) if policy.device.type == "cuda" else ("none", None, "auto")
    if config.training.fit not in needless:
        from midtune.planning.search import fitted

        whole = {"training.prompts_per_step": config.training.prompts_per_step}
        config = fitted(_share(config), sampler, task, choice.blocks, process_bytes, terminal.message)
        config = with_settings(config, whole)
    # What is free, or was ranked before, may look different to each.
    found = choice, config
    choice, config = processes.from_main(lambda: found)
    if config.model.embeddings == "host":
        embed_on_host(policy.model, source.name)
    sampler.limits.unpack = config.model.unpack == "auto"
    sampler.limits.rows.rows = config.training.sampled_prompts * config.training.group_size or None
    blocks = list(range(policy.num_blocks)) if config.blocks.select == "boost" else choice.blocks
    opened.config = config
    return Training(folder, opened, sampler, choice, blocks, meter, process_bytes, plan)


def _share(config: RunConfig) -> RunConfig:
    """The configuration with the prompts that one process has of each step."""
    own = processes.even_share(config.training.prompts_per_step)
    return with_settings(config, {"training.prompts_per_step": own})


def _begin(training: Training) -> None:
    folder, policy, choice, config = training.folder, training.policy, training.choice, training.opened.config
    trained = len(training.blocks) * count_parameters(policy.blocks[training.blocks[0]])
    folder.require_free(trained * CHECKPOINT_BYTES_PER_PARAMETER)
    folder.write_json(folder.start, {"choice": choice.how, "ranking": choice.ranking})
    folder.begin(dump_config(config), policy.computes, config.seed)


def _score_before(training: Training) -> Evaluation:
    """The scores before training; a resumed run reads them from start.json."""
    import numpy as np

    folder = training.folder
    known = processes.from_main(lambda: folder.read_json(folder.start))
    if "greedy" in known:
        sampled = None if known["sampled"] is None else np.array(known["sampled"])
        greedy, kept = np.array(known["greedy"]), known.get("kept", False)
        return Evaluation(greedy, sampled, known.get("completions", []), kept=kept)
    before = training.opened.score(training.sampler, "scoring before training", of_base=True)
    scores = {
        "completions": before.completions[:SHOWN_PROBLEMS],
        "greedy": before.greedy.tolist(),
        "sampled": None if before.sampled is None else before.sampled.tolist(),
    }
    folder.write_json(folder.start, {**known, **scores, "kept": before.kept})
    return before


def _train(training: Training, checkpoint: Path | None, stop: Stop) -> int:
    """Train; returns the peak bytes."""
    opened, folder, meter = training.opened, training.folder, training.meter
    config, task = opened.config, opened.task
    # Memory that scoring left behind does not count.
    give_back()
    meter.reset_peak()
    title = f"{opened.source.name}, {task.name}, blocks {numbers_text(training.policy.trained)}"
    # If memory ran out before, resume with the batch sizes that fitted.
    last_step = (folder.read_metrics() or [{}])[-1]
    limit = training.sampler.limits.rows
    limit.rows = last_step.get("sampling_rows", limit.rows)
    boosted = config.blocks.select == "boost"
    with stop.after_the_step(), opened.terminal.training(config.training.steps, title) as display:

        def on_step(metrics: dict[str, Any]) -> None:
            folder.append_jsonl(folder.metrics, metrics)
            display.update(metrics)

        def stop_requested() -> bool:
            stop.asked = any(processes.gathered([stop.asked]))
            if stop.asked:
                opened.terminal.message("stopping after this step; its checkpoint is being saved")
            return stop.asked

        last = train_blocks(
            training.sampler,
            task.train,
            task.reward,
            config.training,
            folder=folder.checkpoints,
            seed=config.seed,
            meter=meter,
            lr_multipliers=dict.fromkeys(training.choice.blocks, config.blocks.boost) if boosted else {},
            on_step=on_step,
            on_sample=lambda sample: folder.append_jsonl(folder.samples, sample),
            on_message=opened.terminal.message,
            stop_requested=stop_requested,
            resume_from=checkpoint,
            update_rows=last_step.get("update_rows"),
        )
    if stop.asked:
        raise Interrupted(
            f"stopped after step {last} of {config.training.steps}; go on with `midtune train --resume {folder}`."
        )
    return max(processes.gathered([meter.peak_bytes()]))


def _report(
    training: Training, before: Evaluation, after: Evaluation, peak_bytes: int, patch_bytes: int
) -> dict[str, Any]:
    """Build report.json. The model is released before another one is loaded."""
    from midtune.planning.estimate import estimated, one_more_block

    folder, policy, opened = training.folder, training.policy, training.opened
    config, terminal, several = _share(opened.config), opened.terminal, processes.count()
    steps = folder.read_metrics()
    measured = config.evaluation.baseline == "measured"
    time = summary.step_times(steps, repeated=FULL_STEPS if measured else 0)
    phases = time.get("compared_phases") or time
    estimates = {
        arm: estimated(
            arm,
            config,
            training.sampler,
            opened.task,
            steps,
            measured=phases,
            process_bytes=training.process_bytes,
        )
        for arm in (["trl-qlora"] if measured else ["trl-full", "trl-qlora"])
    }
    more = one_more_block(config, training.sampler, opened.task, steps, measured=phases)
    trainable = sum(p.numel() for p in policy.trained_parameters().values())
    total, stored_quantized = policy.total_parameters, policy.stored_quantized
    slower = tail_note(policy)
    del policy, training.sampler
    give_back()

    scores_deployed = config.evaluation.deployed and not stored_quantized
    deployed = _score_deployed(opened, folder) if scores_deployed else None
    processes.part()
    if not processes.is_main():
        return {}
    kept = {"trained": before.kept, "unquantized": deployed is not None and deployed[0].kept}
    if measured:
        terminal.message(f"measuring full training: {FULL_STEPS} steps in a process of its own")
        full = in_own_process(
            "midtune.stages.subprocess_job:full_training_of",
            {"config_file": str(folder.config), "prompts": config.training.prompts_per_step},
            what="measuring full training",
            instead="use --baseline estimated",
        )
    else:
        full = estimates["trl-full"]
    unknown = [found["note"] for found in estimates.values() if found["note"]]
    for note in unknown:
        terminal.message(note)
    collapse = collapse_in(steps)
    return summary.build(
        model=opened.source.name,
        task=opened.task.name,
        blocks=training.blocks,
        quality=(before.greedy, after.greedy),
        sampled=(
            None if before.sampled is None or after.sampled is None else (before.sampled, after.sampled)
        ),
        deployed=None if deployed is None else (deployed[0].greedy, deployed[1].greedy),
        steps=steps,
        time=time,
        peak_bytes=peak_bytes,
        process_bytes=training.process_bytes,
        memory_source=training.meter.source,
        full=full,
        full_source=config.evaluation.baseline,
        qlora=estimates["trl-qlora"],
        trainable_parameters=trainable,
        total_parameters=total,
        patch_bytes=patch_bytes,
        probe=folder.read_json(folder.start)["choice"],
        seed=config.seed,
        notes=[
            *([f"{sentence(str(collapse))}."] if collapse else []),
            *unknown,
            *slower,
            *[SHARED.format(several)] * (several > 1),
            *[KEPT] * any(kept.values()),
        ],
        one_more=more,
        scoring={"problems": len(before.greedy), "planned_share": training.scoring.share, "kept": kept},
    )


def _score_deployed(opened: Opened, folder: RunFolder) -> tuple[Evaluation, Evaluation]:
    policy = opened.policy(quantize="none")
    sampler = opened.sampler(policy)
    before = opened.score(sampler, "scoring the unquantized model", samples=0, of_base=True)
    apply_patch(policy, folder.patch)
    after = opened.score(sampler, "scoring it with the patch", samples=0)
    del policy, sampler
    give_back()
    return before, after


def _write_before_after(folder: RunFolder, task: Task, before: Evaluation, after: Evaluation) -> None:
    # In a resumed run, `before` has only the first ones.
    shown = zip(task.held_out, before.completions[:SHOWN_PROBLEMS], after.completions, strict=False)
    problems = [
        {
            # A game's first observation is in the question.
            "prompt": completion_text(row["prompt"]) if task.game is None else row["question"],
            "answer": row.get("answer"),
            "before": {"completion": was, "score": before.greedy[place]},
            "after": {"completion": now, "score": after.greedy[place]},
        }
        for place, (row, was, now) in enumerate(shown)
    ]
    folder.write_json(folder.before_after, {"problems": problems})


def _draw(folder: RunFolder, report: dict[str, Any], terminal: Terminal) -> None:
    try:
        learning_curve(folder.read_metrics(), report, folder.curve)
        folder.write_text(folder.page, run_page(read_run(folder)))
        terminal.message(f"report page: {folder}/{folder.page.name}")
    except Exception as error:  # noqa: BLE001 (the run is complete without its pictures)
        terminal.message(
            f"the run is complete, but its pictures failed ({type(error).__name__}: {error}); "
            f"try again with `midtune report {folder}`"
        )
