"""The commands: each parses its arguments, calls one stage and prints its result.

Results go to stdout; progress, messages and errors go to stderr. Errors are printed here and nowhere else.
Whatever takes long to import waits until the arguments have been read.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from midtune import __version__
from midtune.config import (
    MOST_TOKENS,
    PLANNED_CARD,
    PLANNED_PROMPT_TOKENS,
    RunConfig,
    load_config,
    parse_assignment,
    require_task,
    setting,
)
from midtune.device import show_one_card
from midtune.errors import InputError, MidtuneError, RunStopped, bounded, escaped, lack_of, plain
from midtune.measure.cards import card_names
from midtune.network import go_offline

if TYPE_CHECKING:
    from rich.console import RenderableType

    from midtune.report.terminal import Terminal

# What an option sets; its help, choices and default are those of the key.
SETTINGS = {
    "model": "model.name",
    "quantize": "model.quantize",
    "device": "model.device",
    "adapter": "model.adapter",
    "task": "task.name",
    "reward": "task.reward",
    "prompt_column": "task.prompt_column",
    "answer_column": "task.answer_column",
    "prompt_format": "task.prompt_format",
    "template": "task.template",
    "eval_file": "task.eval_file",
    "eval_size": "task.eval_size",
    "layers": "blocks.layers",
    "top_k": "blocks.top_k",
    "probe": "blocks.probe",
    "select": "blocks.select",
    "algorithm": "training.algorithm",
    "steps": "training.steps",
    "lr": "training.lr",
    "beta": "training.beta",
    "prompts_per_step": "training.prompts_per_step",
    "group_size": "training.group_size",
    "max_new_tokens": "training.max_new_tokens",
    "temperature": "training.temperature",
    "fit": "training.fit",
    "report_to": "training.report_to",
    "samples": "evaluation.samples",
    "k": "evaluation.k",
    "baseline": "evaluation.baseline",
    "method": "probe.method",
    "probed": "probe.layers",
    "budget": "probe.budget",
    "seeds": "probe.seeds",
    "full_lr": "probe.full_lr",
    "seed": "seed",
}
ALLOWED_WITH_RESUME = {"model", "out", "resume", "offline", "dry_run", "as_json", "quiet", "debug"}
INTERRUPTED = 130
# Width of tables in a pipe or a file, which have none of their own.
PIPE_WIDTH = 100


def _option(name: str, panel: str, flag: str | None = None, metavar: str | None = None) -> Any:
    known = setting(SETTINGS[name])
    assert known is not None, name
    notes = known.description
    if known.default is not None and "default" not in notes:
        shown = f"{known.default:g}" if isinstance(known.default, float) else known.default
        notes += f" (default: {shown})"
    return typer.Option(
        flag or "--" + name.replace("_", "-"),
        help=notes,
        metavar="|".join(known.choices) or metavar,
        show_default=False,
        rich_help_panel=panel,
    )


def _plain_option(flag: str, help: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=help, metavar=metavar, show_default=False, rich_help_panel=panel)


def _count(flag: str, help: str, least: int = 1, panel: str = "Bench") -> Any:
    return typer.Option(
        flag, help=help, metavar="N", min=least, max=MOST_TOKENS, show_default=False, rich_help_panel=panel
    )


_model_setting = setting("model.name")
assert _model_setting is not None
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"{_model_setting.description} (default: {_model_setting.default}, with its own recipe)",
        show_default=False,
    ),
]
Quantize = Annotated[str | None, _option("quantize", "Model")]
Device = Annotated[str | None, _option("device", "Model")]
Adapter = Annotated[str | None, _option("adapter", "Model")]

TaskName = Annotated[str | None, _option("task", "Task")]
TaskArgs = Annotated[
    list[str] | None,
    _plain_option("--task-arg", "argument of a reasoning-gym dataset; repeatable", "Task", "KEY=VALUE"),
]
Reward = Annotated[list[str] | None, _option("reward", "Task", metavar="NAME[=WEIGHT]")]
PromptColumn = Annotated[str | None, _option("prompt_column", "Task")]
AnswerColumn = Annotated[str | None, _option("answer_column", "Task")]
PromptFormat = Annotated[str | None, _option("prompt_format", "Task")]
Template = Annotated[str | None, _option("template", "Task")]
EvalFile = Annotated[str | None, _option("eval_file", "Task")]

Layers = Annotated[str | None, _option("layers", "Blocks")]
TopK = Annotated[int | None, _option("top_k", "Blocks")]
ProbeFile = Annotated[Path | None, _option("probe", "Blocks")]
Select = Annotated[str | None, _option("select", "Blocks")]

Algorithm = Annotated[str | None, _option("algorithm", "Training")]
Steps = Annotated[int | None, _option("steps", "Training")]
LearningRate = Annotated[float | None, _option("lr", "Training")]
Beta = Annotated[float | None, _option("beta", "Training")]
PromptsPerStep = Annotated[int | None, _option("prompts_per_step", "Training")]
GroupSize = Annotated[int | None, _option("group_size", "Training")]
MaxNewTokens = Annotated[int | None, _option("max_new_tokens", "Training")]
Temperature = Annotated[float | None, _option("temperature", "Training")]
Fit = Annotated[str | None, _option("fit", "Training")]
ReportTo = Annotated[str | None, _option("report_to", "Training")]
Resume = Annotated[
    bool,
    _plain_option("--resume", "continue a run exactly; its folder is MODEL or --out", "Training"),
]

EvalSize = Annotated[int | None, _option("eval_size", "Evaluation")]
Samples = Annotated[int | None, _option("samples", "Evaluation")]
PassAtK = Annotated[str | None, _option("k", "Evaluation")]
TaskNames = Annotated[list[str] | None, _option("task", "Task")]
Baseline = Annotated[str | None, _option("baseline", "Evaluation")]

Method = Annotated[str | None, _option("method", "Probe")]
Probed = Annotated[str | None, _option("probed", "Probe", "--layers")]
Budget = Annotated[str | None, _option("budget", "Probe")]
Seeds = Annotated[int | None, _option("seeds", "Probe")]
FullLearningRate = Annotated[float | None, _option("full_lr", "Probe")]

Recipe = Annotated[
    Path | None, _plain_option("--recipe", "a YAML file of settings; options override it", "Settings")
]
Set = Annotated[
    list[str] | None,
    _plain_option(
        "--set", "any key of a recipe, such as training.top_p=0.9; repeatable", "Settings", "KEY=VALUE"
    ),
]
Seed = Annotated[int | None, _option("seed", "Settings")]


def _go_offline(offline: bool) -> bool:
    if offline:
        go_offline()
    return offline


Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="download nothing, use what is on this machine",
        callback=_go_offline,
        show_default=False,
        rich_help_panel="Settings",
    ),
]
Out = Annotated[
    Path | None,
    _plain_option("--out", "folder for what the command leaves (default: runs/NAME)", "Output"),
]
AsJson = Annotated[bool, _plain_option("--json", "print the result as one JSON object", "Output")]
Quiet = Annotated[bool, _plain_option("--quiet", "no progress and no messages", "Output")]
Debug = Annotated[bool, _plain_option("--debug", "show the traceback of an unexpected error", "Output")]


class Command(TyperCommand):
    """A command whose help has a section for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections, in the order in which the parameters are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                panel = getattr(parameter, "rich_help_panel", None)
                default = "Arguments" if parameter.param_type_name == "argument" else "Output"
                sections.setdefault(panel or default, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: Rich takes as long to load as all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Reinforcement learning of one transformer block over a frozen 4-bit model.

    \b
    Example: train the bundled model on its own task.
      midtune train --top-k 1
    """
    if version:
        print(f"midtune {__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command(cls=Command, short_help="train blocks, report what it gained and saved")
def train(
    ctx: typer.Context,
    model: Model = None,
    quantize: Quantize = None,
    device: Device = None,
    adapter: Adapter = None,
    task: TaskName = None,
    task_arg: TaskArgs = None,
    reward: Reward = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    prompt_format: PromptFormat = None,
    template: Template = None,
    eval_file: EvalFile = None,
    layers: Layers = None,
    top_k: TopK = None,
    probe: ProbeFile = None,
    select: Select = None,
    algorithm: Algorithm = None,
    steps: Steps = None,
    lr: LearningRate = None,
    beta: Beta = None,
    prompts_per_step: PromptsPerStep = None,
    group_size: GroupSize = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    fit: Fit = None,
    report_to: ReportTo = None,
    resume: Resume = False,
    eval_size: EvalSize = None,
    samples: Samples = None,
    baseline: Baseline = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    offline: Offline = False,
    dry_run: Annotated[
        bool,
        _plain_option("--dry-run", "say what the run would do, and load and fetch nothing", "Output"),
    ] = False,
    out: Out = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the chosen blocks, score them before and after, and report what was gained and saved.

    \b
    Example:
      midtune train smollm2-135m --task reasoning-gym:chain_sum --task-arg min_terms=2 --top-k 1
    """
    folder = _resumed(ctx) if resume else None
    config = _loaded(folder / "config.yaml", {}) if folder else _configure(ctx)

    if dry_run:

        def preview(terminal: Terminal) -> dict[str, Any]:
            with _imports():
                from midtune.stages import dry_run as stage

            with terminal.progress(f"planning {config.model.name}", None):
                return stage.run(config, out=out, resume=folder)

        _show("dry_run", _run(preview, quiet), as_json)
        return

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import train as stage

        return stage.run(config, out=None if folder else out, resume=folder, terminal=terminal)

    _show("report", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="rank the blocks by what training each would pay")
def probe(
    ctx: typer.Context,
    model: Model = None,
    quantize: Quantize = None,
    device: Device = None,
    task: TaskName = None,
    task_arg: TaskArgs = None,
    reward: Reward = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    prompt_format: PromptFormat = None,
    template: Template = None,
    eval_file: EvalFile = None,
    method: Method = None,
    probed: Probed = None,
    top_k: TopK = None,
    budget: Budget = None,
    seeds: Seeds = None,
    full_lr: FullLearningRate = None,
    algorithm: Algorithm = None,
    steps: Steps = None,
    lr: LearningRate = None,
    prompts_per_step: PromptsPerStep = None,
    group_size: GroupSize = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    resume: Resume = False,
    eval_size: EvalSize = None,
    samples: Samples = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    offline: Offline = False,
    out: Out = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank the blocks by how much training each would pay, with intervals and prices.

    \b
    Example:
      midtune probe --budget 5m --out runs/ranking
    """
    folder = _resumed(ctx) if resume else None
    config = _loaded(folder / "config.yaml", {}) if folder else _configure(ctx)

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import probe as stage

        return stage.run(config, out=None if folder else out, resume=folder, terminal=terminal)

    _show("probe", _run(stage, quiet), as_json)


@app.command("eval", cls=Command, short_help="score a model, a run or a patch")
def evaluate(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="a model, a run folder or a patch folder")],
    quantize: Quantize = None,
    device: Device = None,
    task: TaskNames = None,
    task_arg: TaskArgs = None,
    reward: Reward = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    prompt_format: PromptFormat = None,
    template: Template = None,
    eval_file: EvalFile = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    eval_size: EvalSize = None,
    samples: Samples = None,
    k: PassAtK = None,
    lm_eval: Annotated[
        str | None,
        _plain_option("--lm-eval", "also tasks of lm-evaluation-harness", "Evaluation", "TASK,TASK"),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        _plain_option(
            "--lm-eval-path", "folder that describes such tasks of your own", "Evaluation", "FOLDER"
        ),
    ] = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    offline: Offline = False,
    results: Annotated[
        Path | None,
        _plain_option("--results", "write every problem, its answer and scores, as jsonl", "Output", "FILE"),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score a model, a run or a patch on held-out problems.

    A run or the patch inside it is scored beside its base model, on its own task, unless others are given: --task can
    be repeated.

    \b
    Example:
      midtune eval runs/tiny --quantize none
    """
    harness_tasks = [name.strip() for name in (lm_eval or "").split(",") if name.strip()]
    configs = []
    for place in range(max(len(task or []), 1)):
        ctx.params["task"] = task[place] if task else None
        configs.append(_configure(ctx, target=target, task_needed=not harness_tasks))

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import evaluate as stage

        return stage.run(
            target,
            configs,
            lm_eval=harness_tasks,
            lm_eval_path=lm_eval_path,
            results=results,
            terminal=terminal,
        )

    _show("score", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="let several runs of one base model vote")
def vote(
    ctx: typer.Context,
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="two or more run folders or patch folders of one base model",
            exists=True,
            file_okay=False,
        ),
    ],
    quantize: Quantize = None,
    device: Device = None,
    task: TaskName = None,
    task_arg: TaskArgs = None,
    reward: Reward = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    prompt_format: PromptFormat = None,
    template: Template = None,
    eval_file: EvalFile = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    eval_size: EvalSize = None,
    samples: Samples = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    offline: Offline = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score several runs of one base model, each alone and by a majority vote on every problem.

    They are scored on the first run's own task, unless another one is given.

    \b
    Example:
      midtune vote runs/block-10 runs/block-12 runs/block-14
    """
    targets = [str(run) for run in runs]
    config = _configure(ctx, target=targets[0])

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import vote as stage

        return stage.run(targets, config, terminal=terminal)

    _show("vote", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="say what fits on a card, before anything is loaded")
def plan(
    ctx: typer.Context,
    model: Model = None,
    gpu: Annotated[
        str,
        _plain_option(
            "--gpu", f"the card: memory or name; or cpu (default: {PLANNED_CARD})", "Plan", "24GB|NAME|cpu"
        ),
    ] = PLANNED_CARD,
    prompt_tokens: Annotated[
        int,
        _count(
            "--prompt-tokens",
            f"tokens of the longest prompt (default: {PLANNED_PROMPT_TOKENS})",
            panel="Plan",
        ),
    ] = PLANNED_PROMPT_TOKENS,
    max_new_tokens: Annotated[int | None, _option("max_new_tokens", "Plan", "--new-tokens")] = None,
    group_size: Annotated[int | None, _option("group_size", "Plan")] = None,
    prompts_per_step: Annotated[int | None, _option("prompts_per_step", "Plan")] = None,
    layers: Layers = None,
    top_k: TopK = None,
    quantize: Quantize = None,
    recipe: Recipe = None,
    set_: Set = None,
    offline: Offline = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say how much memory training would take and how long a step at least, for midtune and for TRL.

    Nothing is loaded or downloaded: the model's configuration is enough, and those of common models are shipped.

    \b
    Example:
      midtune plan Qwen/Qwen3-8B --gpu 24GB
    """
    config = _configure(ctx, task_needed=False)

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import plan as stage

        with terminal.progress(f"planning {config.model.name}", None):
            return stage.run(config, gpu=gpu, prompt_tokens=prompt_tokens)

    _show("plan", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="write a checkpoint with the trained blocks in place")
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    out: Annotated[
        Path, typer.Option(help="folder for the checkpoint", show_default=False, rich_help_panel="Output")
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a complete checkpoint: the base model with the trained blocks in place.

    \b
    Example:
      midtune merge runs/tiny --out merged
    """

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import merge as stage

        return stage.run(run, out=out, terminal=terminal)

    _show("merge", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="write the HTML page of a run, or of several compared")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="the folders of one or more runs")],
    out: Annotated[
        Path | None,
        _plain_option(
            "--out",
            "the page (default: report.html in the folder of a single run, comparison.html here for several)",
            "Output",
            "FILE",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a run, or one that compares several; it needs no network.

    \b
    Example:
      midtune report runs/tiny
    """

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import report as stage

        return stage.run(runs, out=out)

    _show("page", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="compare with TRL on the same prompts and completions")
def bench(
    ctx: typer.Context,
    model: Model = None,
    model_option: Annotated[
        str | None,
        _plain_option("--model", "the model, for those who would rather name it", "Model", "MODEL"),
    ] = None,
    device: Device = None,
    set_: Set = None,
    arms: Annotated[
        str,
        _plain_option(
            "--arms",
            "what to compare, the first with all others (default: midtune,trl-full,trl-block,trl-qlora)",
            "Bench",
            "ARM,ARM",
        ),
    ] = "midtune,trl-full,trl-block,trl-qlora",
    layers: Layers = None,
    prompts: Annotated[int, _count("--prompts", "prompts of a step (default: 4)")] = 4,
    prompt_tokens: Annotated[int, _count("--prompt-tokens", "tokens of a prompt (default: 50)")] = 50,
    new_tokens: Annotated[int, _count("--new-tokens", "tokens of every completion (default: 24)")] = 24,
    group_size: Annotated[int, _count("--group-size", "completions of a prompt (default: 8)", 2)] = 8,
    steps: Annotated[int, _count("--steps", "steps counted, after one that warms up (default: 5)")] = 5,
    micro_batch_tokens: Annotated[
        int | None,
        _count("--micro-batch-tokens", "most tokens in one backward pass of any arm (default: 16384)"),
    ] = None,
    profile: Annotated[
        bool, _plain_option("--profile", "say where the first arm's time goes, in one more step", "Bench")
    ] = False,
    seed: Seed = None,
    out: Out = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the same prompts and completions with midtune and with TRL, and compare time and memory.

    \b
    Example:
      midtune bench smollm2-135m --arms midtune,trl-full
    """
    named = {
        "model.name": model or model_option,
        "model.device": device,
        "blocks.layers": layers,
        "seed": seed,
    }
    named |= dict(parse_assignment(text) for text in set_ or [])
    config = _loaded(None, {key: value for key, value in named.items() if value is not None})

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import bench as stage

        return stage.run(
            config,
            arms=[arm.strip() for arm in arms.split(",") if arm.strip()],
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            group_size=group_size,
            steps=steps,
            micro_batch_tokens=micro_batch_tokens,
            profile=profile,
            out=out,
            terminal=terminal,
        )

    _show("bench", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="say how far rankings of blocks agree")
def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="PROBE", help="probe.json files, or run folders that hold one")
    ],
    top_k: Annotated[
        int, _count("--top-k", "best blocks whose overlap is counted (default: 5)", panel="Compare")
    ] = 5,
    out: Annotated[
        Path | None,
        _plain_option("--out", "a picture of the rankings over depth: .svg, .png or .pdf", "Output", "FILE"),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say how far rankings agree: across tasks, algorithms, seeds or models.

    \b
    Example:
      midtune compare runs/sums runs/products --out rankings.svg
    """

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import compare as stage

        return stage.run(files, top_k=top_k, out=out, terminal=terminal)

    _show("compare", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="list tasks, show a problem of one, or check your own")
def tasks(
    ctx: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK",
            help="show a problem of this task: a reasoning-gym dataset or whatever --task takes; or `check`",
            show_default=False,
        ),
    ] = None,
    checked: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK", help="after `check`: read and try all of this task", show_default=False
        ),
    ] = None,
    task_arg: TaskArgs = None,
    reward: Reward = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    prompt_format: PromptFormat = None,
    template: Template = None,
    eval_file: EvalFile = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    offline: Offline = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the tasks that need no file, show a problem of a task with a right and a wrong answer, or check one.

    \b
    Example:
      midtune tasks chain_sum --task-arg max_terms=2
      midtune tasks check my_task.py
    """
    check = task == "check"
    if check and checked is None:
        raise InputError(
            "`midtune tasks check` needs the task to check; add a task file, a data file or a name."
        )
    if not check and checked is not None:
        raise InputError(f"one task is shown at a time, but {task} and {checked} were given; leave one out.")
    ctx.params["task"] = checked if check else task
    config = _configure(ctx, task_needed=False)

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import tasks as stage

        return stage.run(config if task or recipe else None, terminal, check=check)

    _show("tasks", _run(stage, quiet), as_json)


@app.command(cls=Command, short_help="say whether this machine is ready")
def doctor(
    ctx: typer.Context,
    device: Device = None,
    set_: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say whether this machine is ready: versions, device, memory, disk, 4-bit, a step of training, network.

    Ends with exit code 1 if something has to be mended first. Asks the hub and the package index whether they
    answer, and sends nothing else.

    \b
    Example:
      midtune doctor
    """
    config = _configure(ctx, task_needed=False)

    def stage(terminal: Terminal) -> dict[str, Any]:
        with _imports():
            from midtune.stages import doctor as stage

        return stage.run(terminal, device=config.model.device, dtype=config.model.dtype)

    result = _run(stage, quiet)
    _show("doctor", result, as_json)
    if result.get("problems"):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run midtune and exit: 0, 2 for bad input, 130 when interrupted, 1 for an error of its own or a problem found.

    Args:
        arguments: the command line without the program's name; default: that of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments or os.environ.get("MIDTUNE_DEBUG", "") not in ("", "0")
    _hold_streams()
    _quieten_libraries(debug)
    started = time.time()
    code = 1
    try:
        code = app(arguments, prog_name="midtune", standalone_mode=False) or 0
        if code == INTERRUPTED:  # what Typer makes of Ctrl-C
            _complain("interrupted.")
    except MidtuneError as error:
        code = error.exit_code
        _complain(str(error))
    except typer.TyperException as error:
        # A wrong option or value, found by Typer.
        code = 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "midtune"
        said = _one_line(error.format_message()).removeprefix("Got unexpected ").rstrip(".")
        _complain(f"{said}; see `{command} --help`.")
    except Exception as error:  # noqa: BLE001 (a traceback is no message)
        if isinstance(error, BrokenPipeError) and not _is_read(sys.stdout):
            pass
        elif not isinstance(error, PermissionError) and (lack := lack_of(error)) is not None:
            code = RunStopped.exit_code
            _complain(f"midtune could not go on because {lack}, then do it again.")
        elif isinstance(error, OSError) and error.filename is not None:
            # A path that was given: too long, not to be read, a folder where a file should be.
            code = 2
            named = _one_line(str(error.filename))
            _complain(f"{named} cannot be used: {error.strerror}; give another path or mend it.")
        else:
            folder = _latest_run(arguments, started)
            where = f" (the run is in {folder})" if folder else ""
            hint = "" if debug else "; run it again with --debug to see where."
            said = _one_line(str(error)) or "no message"
            _complain(f"unexpected {type(error).__name__}: {said}{where}{hint}")
        if debug:
            _write(traceback.format_exc())
    if not _is_read(sys.stdout):
        code = code or 1
    sys.exit(code)


def _hold_streams() -> None:
    """Make sure that there are standard streams, and that no text fails to be written to them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the first file to be opened would get the number, and what is meant for a person.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _is_read(stream: Any) -> bool:
    """Write what waits to be written; where nobody reads it, it goes nowhere from now on, without another error."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def _quieten_libraries(debug: bool) -> None:
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }
    if not debug:
        quiet |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
        warnings.simplefilter("ignore")
        # They recommend a package that midtune has no use for, and report on their own caches.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def _complain(message: str) -> None:
    _write(f"error: {bounded(message)}\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(plain(text))
    _is_read(sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(bounded(text, 400).split())


def _latest_run(arguments: Sequence[str], started: float) -> Path | None:
    """The run folder that a command begun at `started` was writing to, if there is one."""
    from midtune.runs import RUNS

    written: dict[Path, float] = {}
    for path in [*(Path(argument.removeprefix("--out=")) for argument in arguments), *RUNS.glob("*")]:
        # An argument that is no path, or is too long for one.
        with contextlib.suppress(OSError, ValueError):
            written[path] = (path / "config.yaml").stat().st_mtime
    # A second of grace, for file systems with coarse times.
    found = [path for path, when in written.items() if when >= started - 1]
    return max(found, key=written.__getitem__, default=None)


def _configure(ctx: typer.Context, target: str | None = None, task_needed: bool = True) -> RunConfig:
    """The configuration that the options of a command describe."""
    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ())}
    overrides = {SETTINGS[name]: value for name, value in given.items() if name in SETTINGS}
    overrides |= dict(parse_assignment(text) for text in given.get("set_", []))
    for text in given.get("task_arg", []):
        key, value = _task_argument(text)
        overrides[f"task.args.{key}"] = value
    recipe = given.get("recipe")
    if target is not None:
        own = _own_recipe(Path(target))
        recipe = recipe or own
        if own is None:
            overrides["model.name"] = _base_of(target)
    config = _loaded(recipe, overrides)
    if task_needed:
        require_task(config)
    return config


def _loaded(recipe: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration, and this process made to see the one card that it names."""
    config = load_config(recipe, overrides)
    if config.model.device != "cpu":
        show_one_card(config.model.device, len(card_names()))
    return config


def _task_argument(text: str) -> tuple[str, Any]:
    return parse_assignment(text, "--task-arg key=value")


def _own_recipe(target: Path) -> Path | None:
    """The settings of the run that `target` is, or is the patch of."""
    from midtune.runs import RunFolder

    for folder in (target, target.absolute().parent):
        is_run = (folder / "config.yaml").is_file()
        if is_run and (folder == target or (target / "patch.json").is_file()):
            return RunFolder.open(folder).config
    return None


def _base_of(target: str) -> str:
    """The model that `target` is, or is a patch of."""
    description = Path(target, "patch.json")
    if not description.is_file():
        return target
    from midtune.model.patch import read_patch

    return read_patch(description.parent).base_model


def _resumed(ctx: typer.Context) -> Path:
    """The run folder to continue, from MODEL or --out."""
    from midtune.runs import RunFolder

    others = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name not in ALLOWED_WITH_RESUME
        and ctx.params.get(str(parameter.name)) not in (None, [], ())
    ]
    if others:
        raise InputError(
            f"--resume keeps the settings of the run, but {', '.join(others)} was given too; leave it out."
        )
    model, out = ctx.params["model"], ctx.params["out"]
    if (model is None) == (out is None):
        what = "two folders" if model is not None else "none"
        raise InputError(f"--resume needs the folder of one run and got {what}; write `--resume runs/NAME`.")
    return RunFolder.open(Path(model or out)).path


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Imports libraries without collecting garbage, whose search takes longer the more there is, and finds none."""
    gc.disable()
    try:
        yield
    finally:
        # What lives as long as the process is never searched again.
        if gc.get_freeze_count() == 0:
            gc.freeze()
        gc.enable()


def _run(stage: Callable[[Terminal], dict[str, Any]], quiet: bool) -> dict[str, Any]:
    from midtune.report.terminal import PlainStream, Terminal

    # Libraries and rewards that print must not get into the result.
    with contextlib.redirect_stdout(PlainStream(sys.stderr)):
        return stage(Terminal(quiet=quiet))


def _show(kind: str, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        # JSON has no NaN.
        values = json.loads(json.dumps(result, default=str), parse_constant=lambda name: None)
        print(escaped(json.dumps(values, indent=2, ensure_ascii=False)))
        return
    from midtune.report.terminal import PlainConsole

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    PlainConsole(width=width).print(_table(kind, result))


def _table(kind: str, result: dict[str, Any]) -> RenderableType:
    from midtune.report import plans, ranking, results, tables

    tables_of = {
        "report": tables.report_table,
        "probe": ranking.probe_table,
        "score": results.score_table,
        "dry_run": plans.dry_run_text,
        "vote": results.vote_table,
        "merge": results.merge_text,
        "page": results.page_text,
        "bench": results.bench_table,
        "compare": results.compare_table,
        "tasks": results.tasks_text,
        "doctor": results.doctor_table,
        "plan": plans.plan_table,
    }
    return tables_of[kind](result)
