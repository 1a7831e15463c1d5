"""The commands: each reads what was typed, calls one stage and prints its result.

`COMMANDS` is the table of them all. To give a command another setting as an option, add the setting's name to one of
its panels: help, type, choices and default come from config.py. A new command is a row here, a file in stages/ and a
printer in report/.

Results go to stdout; progress, messages and errors go to stderr. Errors are printed here and nowhere else.
Whatever takes long to import waits until the arguments have been read.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from midtune import __version__
from midtune.config import (
    MOST_TOKENS,
    PLANNED_CARD,
    PLANNED_PROMPT_TOKENS,
    SETTINGS,
    RunConfig,
    load_config,
    parse_assignment,
    require_task,
)
from midtune.device import show_one_card
from midtune.errors import InputError, MidtuneError, RunStopped, bounded, escaped, lack_of, one_line
from midtune.measure.cards import card_names
from midtune.network import go_offline
from midtune.process import fast_imports, hold_streams, is_read, quieten_libraries, say

INTERRUPTED = 130
# Table width in a pipe or a file.
PIPE_WIDTH = 100
ARGUMENTS = "Arguments"
EVERY_COMMAND = "json quiet debug"
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command.

    `flag` defaults to the parameter's name with dashes. `reader` is who is given the value: `stage`, `config` or
    `cli`. `key` is the setting that it sets, such as `training.lr`. `checks` go to `typer.Option` or `typer.Argument`.
    """

    kind: Any
    help: str
    metavar: str | None = None
    default: Any = None
    flag: str | None = None
    reader: str = "stage"
    key: str | None = None
    checks: Mapping[str, Any] = field(default_factory=dict)

    def option(self, name: str) -> str:
        return self.flag or f"--{name.replace('_', '-')}"

    def declared(self, name: str, panel: str) -> inspect.Parameter:
        """The parameter as Typer reads it."""
        about = {"help": _with_default(self.help, self.default), "metavar": self.metavar, **self.checks}
        about |= {"show_default": False, "rich_help_panel": panel}
        info = typer.Argument(**about) if panel == ARGUMENTS else typer.Option(self.option(name), **about)
        kind = self.kind | None if self.default is None else self.kind
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[kind, info]
        )


def _with_default(help: str, default: Any) -> str:
    if any(default is none for none in (None, False, REQUIRED)) or "default" in help:
        return help
    return f"{help} (default: {f'{default:g}' if isinstance(default, float) else default})"


def _setting(key: str, flag: str | None = None, metavar: str | None = None) -> Parameter:
    """The option that sets `key`."""
    known = SETTINGS[key]
    help = _with_default(known.description, known.default)
    flag = flag or "--" + key.rpartition(".")[2].replace("_", "-")
    # The configuration parses other types from text.
    kind = known.kind if known.kind in (bool, int, float, Path, list[str]) else str
    return Parameter(kind, help, "|".join(known.choices) or metavar, flag=flag, reader="config", key=key)


def _switch(help: str, reader: str = "cli") -> Parameter:
    return Parameter(bool, help, default=False, reader=reader)


def _count(help: str, default: int, least: int = 1) -> Parameter:
    return Parameter(int, help, "N", default, checks={"min": least, "max": MOST_TOKENS})


def _separated(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


_MODEL, _TASK_NAME = _setting("model.name", "--model", "MODEL"), _setting("task.name", "--task")
# Parameters that are not plain settings, by name or as COMMAND.NAME.
PARAMETERS = {
    "model": replace(_MODEL, help=_MODEL.help.replace("tiny)", "tiny, with its own recipe)"), flag=None),
    "task": _TASK_NAME,
    "task_arg": Parameter(
        list[str], "argument of a reasoning-gym dataset; repeatable", "KEY=VALUE", reader="config"
    ),
    "reward": _setting("task.reward", metavar="NAME[=WEIGHT]"),
    "resume": _switch("continue a run exactly; its folder is MODEL or --out", "stage"),
    "recipe": Parameter(Path, "a YAML file of settings; options override it", reader="config"),
    "set": Parameter(
        list[str], "any key of a recipe, such as training.top_p=0.9; repeatable", "KEY=VALUE", reader="config"
    ),
    "offline": _switch("download nothing, use what is on this machine"),
    "dry_run": _switch("say what the run would do, and load and fetch nothing"),
    "out": Parameter(Path, "folder for what the command leaves (default: runs/NAME)"),
    "json": _switch("print the result as one JSON object"),
    "quiet": _switch("no progress and no messages"),
    "debug": _switch("show the traceback of an unexpected error"),
    "eval.target": Parameter(str, "a model, a run folder or a patch folder", "TARGET", REQUIRED),
    "eval.tasks": Parameter(list[str], _TASK_NAME.help, flag="--task"),
    "eval.lm_eval": Parameter(
        str, "also tasks of lm-evaluation-harness", "TASK,TASK", checks={"callback": _separated}
    ),
    "eval.lm_eval_path": Parameter(Path, "folder that describes such tasks of your own", "FOLDER"),
    "eval.results": Parameter(Path, "write every problem, its answer and scores, as jsonl", "FILE"),
    "vote.targets": Parameter(
        list[Path],
        "two or more run folders or patch folders of one base model",
        "RUN",
        REQUIRED,
        checks={"exists": True, "file_okay": False, "path_type": str},
    ),
    "plan.gpu": Parameter(str, "the card: memory or name; or cpu", "24GB|NAME|cpu", PLANNED_CARD),
    "plan.prompt_tokens": _count("tokens of the longest prompt", PLANNED_PROMPT_TOKENS),
    "plan.new_tokens": _setting("training.max_new_tokens", "--new-tokens"),
    "merge.target": Parameter(Path, "the folder of a run", "RUN", REQUIRED),
    "merge.out": Parameter(Path, "folder for the checkpoint", default=REQUIRED),
    "report.folders": Parameter(list[Path], "the folders of one or more runs", "RUN", REQUIRED),
    "report.out": Parameter(
        Path,
        "the page (default: report.html in the folder of a single run, comparison.html here for several)",
        "FILE",
    ),
    "bench.model_option": replace(_MODEL, help="the model, for those who would rather name it"),
    "bench.arms": Parameter(
        str,
        "what to compare, the first with all others",
        "ARM,ARM",
        "midtune,trl-full,trl-block,trl-qlora",
        checks={"callback": _separated},
    ),
    "bench.prompts": _count("prompts of a step", 4),
    "bench.prompt_tokens": _count("tokens of a prompt", 50),
    "bench.new_tokens": _count("tokens of every completion", 24),
    "bench.group_size": _count("completions of a prompt", 8, least=2),
    "bench.steps": _count("steps counted, after one that warms up", 5),
    "bench.profile": _switch("say where the first arm's time goes, in one more step", "stage"),
    "compare.files": Parameter(
        list[Path], "probe.json files, or run folders that hold one", "PROBE", REQUIRED
    ),
    "compare.top_k": _count("best blocks whose overlap is counted", 5),
    "compare.out": Parameter(Path, "a picture of the rankings over depth: .svg, .png or .pdf", "FILE"),
    "tasks.task": Parameter(
        str,
        "show a problem of this task: a reasoning-gym dataset or whatever --task takes; or `check`",
        "TASK",
    ),
    "tasks.checked": Parameter(str, "after `check`: read and try all of this task", "TASK"),
}


@dataclass(frozen=True)
class Given:
    """What was typed for a command; what was not is None, empty or the default."""

    parameters: Mapping[str, Parameter]
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def own(self) -> dict[str, Any]:
        """What the stage is given beside the configuration."""
        return {name: self[name] for name, known in self.parameters.items() if known.reader == "stage"}

    def configuring(self) -> dict[str, Parameter]:
        """What was typed of the configuration."""
        return {
            name: known
            for name, known in self.parameters.items()
            if known.reader == "config" and self[name] not in (None, [], ())
        }

    def arguments(self) -> dict[str, Any]:
        """The same, and the configuration where the command has options that set it."""
        keys = [known.key for known in self.parameters.values() if known.reader == "config"]
        return self.own() | ({"config": self.config(needs_task="task.name" in keys)} if keys else {})

    def config(
        self, target: str | None = None, task: str | None = None, needs_task: bool = True
    ) -> RunConfig:
        """The configuration that the options describe.

        The settings of `target` (a model, run or patch) lie underneath. `task` is for commands without such an option.
        """
        overrides = {} if task is None else {"task.name": task}
        for name, known in self.configuring().items():
            if known.key is not None:
                overrides.setdefault(known.key, self[name])
        overrides |= dict(parse_assignment(text) for text in self["set"] or [])
        for text in self["task_arg"] or []:
            key, value = parse_assignment(text, "--task-arg key=value")
            overrides[f"task.args.{key}"] = value
        own, model = _underneath(target) if target is not None else (None, {})
        config = _loaded(self["recipe"] or own, overrides | model)
        if needs_task:
            require_task(config)
        return config


def _loaded(recipe: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration, and this process made to see the one card that it names."""
    config = load_config(recipe, overrides)
    if config.model.device != "cpu":
        show_one_card(config.model.device, len(card_names()))
    return config


def _underneath(target: str) -> tuple[Path | None, dict[str, str]]:
    """The settings of the run that a target is or is the patch of; of a lone patch or a model, the model."""
    from midtune.runs import RunFolder

    folder = Path(target)
    is_patch = (folder / "patch.json").is_file()
    run = folder.absolute().parent if is_patch else folder
    if (run / "config.yaml").is_file():
        return RunFolder.open(run).config, {}
    if not is_patch:
        return None, {"model.name": target}
    from midtune.model.patch import read_patch

    return None, {"model.name": read_patch(folder).base_model}


def _for_a_run(given: Given) -> dict[str, Any]:
    if not given["resume"]:
        return {**given.arguments(), "resume": None}
    others = [known.option(name) for name, known in given.configuring().items() if known.key != "model.name"]
    if others:
        raise InputError(
            f"--resume keeps the settings of the run, but {', '.join(others)} was given too; leave it out."
        )
    folders = [folder for folder in (given["model"], given["out"]) if folder is not None]
    if len(folders) != 1:
        what = "two folders" if folders else "none"
        raise InputError(f"--resume needs the folder of one run and got {what}; write `--resume runs/NAME`.")
    from midtune.runs import RunFolder

    folder = RunFolder.open(Path(folders[0])).path
    return {"config": _loaded(folder / "config.yaml", {}), "out": None, "resume": folder}


def _for_eval(given: Given) -> dict[str, Any]:
    own = given.own()
    tasks = own.pop("tasks") or [None]
    return {**own, "configs": [given.config(own["target"], task, not own["lm_eval"]) for task in tasks]}


def _for_vote(given: Given) -> dict[str, Any]:
    return {"config": given.config(given["targets"][0]), **given.own()}


def _for_tasks(given: Given) -> dict[str, Any]:
    task, checked, check = given["task"], given["checked"], given["task"] == "check"
    if check and checked is None:
        raise InputError(
            "`midtune tasks check` needs the task to check; add a task file, a data file or a name."
        )
    if not check and checked is not None:
        raise InputError(f"one task is shown at a time, but {task} and {checked} were given; leave one out.")
    config = given.config(task=checked if check else task, needs_task=False)
    return {"config": config if task or given["recipe"] else None, "check": check}


@dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`.

    Args:
        summary: its line in `midtune --help`; `about` is its own help.
        printer: MODULE.FUNCTION in report/ that shows the stage's result.
        panels: title in the help → names of `PARAMETERS` and keys of settings; a key whose part is the title's goes
            without it. `Output` has those of `EVERY_COMMAND` besides.
        arguments: turns what was typed into the arguments of the stage's `run`.
        stage: the file in stages/; default: the command's name.
        progress: what is shown meanwhile, where `run` takes no terminal.
    """

    summary: str
    about: str
    example: str
    printer: str
    panels: Mapping[str, str]
    arguments: Callable[[Given], dict[str, Any]] = Given.arguments
    stage: str = ""
    progress: str = ""


_TASK = "task_arg reward prompt_column answer_column prompt_format template eval_file"
COMMANDS = {
    "train": Command(
        "train blocks, report what it gained and saved",
        "Train the chosen blocks, score them before and after, and report what was gained and saved.",
        "midtune train smollm2-135m --task reasoning-gym:chain_sum --task-arg min_terms=2 --top-k 1",
        "tables.report_table",
        {
            ARGUMENTS: "model",
            "Model": "quantize device adapter",
            "Task": f"task {_TASK}",
            "Blocks": "layers top_k probe select",
            "Training": "algorithm steps lr beta prompts_per_step group_size max_new_tokens temperature "
            "fit report_to resume",
            "Evaluation": "task.eval_size samples baseline",
            "Settings": "recipe set seed offline",
            "Output": "dry_run out",
        },
        _for_a_run,
    ),
    "probe": Command(
        "rank the blocks by what training each would pay",
        "Rank the blocks by how much training each would pay, with intervals and prices.",
        "midtune probe --budget 5m --out runs/ranking",
        "ranking.probe_table",
        {
            ARGUMENTS: "model",
            "Model": "quantize device",
            "Task": f"task {_TASK}",
            "Probe": "method layers budget seeds full_lr",
            "Blocks": "top_k",
            "Training": "algorithm steps lr prompts_per_step group_size max_new_tokens temperature resume",
            "Evaluation": "task.eval_size samples",
            "Settings": "recipe set seed offline",
            "Output": "out",
        },
        _for_a_run,
    ),
    "eval": Command(
        "score a model, a run or a patch",
        "Score a model, a run or a patch on held-out problems.\n\n"
        "A run or the patch inside it is scored beside its base model, on its own task, unless others are given: "
        "--task can be repeated.",
        "midtune eval runs/tiny --quantize none",
        "results.score_table",
        {
            ARGUMENTS: "target",
            "Model": "quantize device",
            "Task": f"tasks {_TASK}",
            "Training": "max_new_tokens temperature",
            "Evaluation": "task.eval_size samples k lm_eval lm_eval_path",
            "Settings": "recipe set seed offline",
            "Output": "results",
        },
        _for_eval,
        stage="evaluate",
    ),
    "vote": Command(
        "let several runs of one base model vote",
        "Score several runs of one base model, each alone and by a majority vote on every problem.\n\n"
        "They are scored on the first run's own task, unless another one is given.",
        "midtune vote runs/block-10 runs/block-12 runs/block-14",
        "results.vote_table",
        {
            ARGUMENTS: "targets",
            "Model": "quantize device",
            "Task": f"task {_TASK}",
            "Training": "max_new_tokens temperature",
            "Evaluation": "task.eval_size samples",
            "Settings": "recipe set seed offline",
        },
        _for_vote,
    ),
    "plan": Command(
        "say what fits on a card, before anything is loaded",
        "Say how much memory training would take and how long a step at least, for midtune and for TRL.\n\n"
        "Nothing is loaded or downloaded: the model's configuration is enough, and those of common models are shipped.",
        "midtune plan Qwen/Qwen3-8B --gpu 24GB",
        "plans.plan_table",
        {
            ARGUMENTS: "model",
            "Plan": "gpu prompt_tokens new_tokens training.group_size training.prompts_per_step",
            "Blocks": "layers top_k",
            "Model": "quantize",
            "Settings": "recipe set offline",
        },
        progress="planning {config.model.name}",
    ),
    "merge": Command(
        "write a checkpoint with the trained blocks in place",
        "Write a complete checkpoint: the base model with the trained blocks in place.",
        "midtune merge runs/tiny --out merged",
        "results.merge_text",
        {ARGUMENTS: "target", "Output": "out"},
    ),
    "report": Command(
        "write the HTML page of a run, or of several compared",
        "Write one HTML page about a run, or one that compares several; it needs no network.",
        "midtune report runs/tiny",
        "results.page_text",
        {ARGUMENTS: "folders", "Output": "out"},
        progress="writing the page",
    ),
    "bench": Command(
        "compare with TRL on the same prompts and completions",
        "Train the same prompts and completions with midtune and with TRL, and compare time and memory.",
        "midtune bench smollm2-135m --arms midtune,trl-full",
        "results.bench_table",
        {
            ARGUMENTS: "model",
            "Model": "model_option device",
            "Settings": "set seed",
            "Bench": "arms prompts prompt_tokens new_tokens group_size steps training.micro_batch_tokens profile",
            "Blocks": "layers",
            "Output": "out",
        },
    ),
    "compare": Command(
        "say how far rankings of blocks agree",
        "Say how far rankings agree: across tasks, algorithms, seeds or models.",
        "midtune compare runs/sums runs/products --out rankings.svg",
        "results.compare_table",
        {ARGUMENTS: "files", "Compare": "top_k", "Output": "out"},
    ),
    "tasks": Command(
        "list tasks, show a problem of one, or check your own",
        "List the tasks that need no file, show a problem of a task with a right and a wrong answer, or check one.",
        "midtune tasks chain_sum --task-arg max_terms=2\n  midtune tasks check my_task.py",
        "results.tasks_text",
        {ARGUMENTS: "task checked", "Task": _TASK, "Settings": "recipe set seed offline"},
        _for_tasks,
    ),
    "doctor": Command(
        "say whether this machine is ready",
        "Say whether this machine is ready: versions, device, memory, disk, 4-bit, a step of training, network.\n\n"
        "Ends with exit code 1 if something has to be fixed first. Asks the hub and the package index whether they "
        "answer, and sends nothing else.",
        "midtune doctor",
        "results.doctor_table",
        {"Model": "device", "Settings": "set"},
    ),
}


class CommandHelp(TyperCommand):
    """A command whose help has a section for each panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections, in the order in which the parameters are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                # Typer's own --help option has no panel.
                panel = getattr(parameter, "rich_help_panel", None) or "Output"
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: loading Rich takes as long as everything else
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


def _add(name: str, command: Command) -> None:
    """Make a row of the table a command of Typer's."""
    parameters: dict[str, Parameter] = {}
    declared = []
    panels = {**command.panels, "Output": f"{command.panels.get('Output', '')} {EVERY_COMMAND}"}
    for panel, words in panels.items():
        for word in words.split():
            known = PARAMETERS.get(f"{name}.{word}") or PARAMETERS.get(word)
            if known is None:
                known = _setting(word if word in SETTINGS else f"{panel.lower()}.{word}")
            parameters[word.replace(".", "_")] = known
            declared.append(known.declared(word.replace(".", "_"), panel))

    def call(**values: Any) -> None:
        _perform(replace(command, stage=command.stage or name), Given(parameters, values))

    call.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    about = f"{command.about}\n\n\b\nExample:\n  {command.example}"
    app.command(name, cls=CommandHelp, help=about, short_help=command.summary)(call)


for _name, _command in COMMANDS.items():
    _add(_name, _command)


def _perform(command: Command, given: Given) -> None:
    if given["offline"]:
        go_offline()
    arguments = command.arguments(given)
    if given["dry_run"]:
        command = replace(COMMANDS["plan"], stage="dry_run", printer="plans.dry_run_text")
    from midtune.report.terminal import PlainConsole, PlainStream, Terminal

    # Keep what libraries and rewards print out of the result.
    with contextlib.redirect_stdout(PlainStream(sys.stderr)):
        terminal = Terminal(quiet=given["quiet"])
        with fast_imports():
            stage = import_module(f"midtune.stages.{command.stage}")
        if command.progress:
            with terminal.progress(command.progress.format(**arguments), None):
                result = stage.run(**arguments)
        else:
            result = stage.run(**arguments, terminal=terminal)
    if given["json"]:
        # JSON has no NaN.
        values = json.loads(json.dumps(result, default=str), parse_constant=lambda name: None)
        print(escaped(json.dumps(values, indent=2, ensure_ascii=False)))
    else:
        module, function = command.printer.split(".")
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
        PlainConsole(width=width).print(getattr(import_module(f"midtune.report.{module}"), function)(result))
    if command.stage == "doctor" and result.get("problems"):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run midtune on `arguments` (default: the command line's) and exit.

    The code is 0, 2 for bad input, 130 when interrupted, 1 for an error of its own or a problem found.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments or os.environ.get("MIDTUNE_DEBUG", "") not in ("", "0")
    hold_streams()
    quieten_libraries(debug)
    trace = ""
    try:
        code = app(arguments, prog_name="midtune", standalone_mode=False) or 0
        said = "interrupted." if code == INTERRUPTED else ""  # Typer's exit code for Ctrl-C
    except MidtuneError as error:
        code, said = error.exit_code, str(error)
    except typer.TyperException as error:
        # Typer found a wrong option or value.
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "midtune"
        wrong = one_line(error.format_message()).removeprefix("Got unexpected ").rstrip(".")
        code, said = 2, f"{wrong}; see `{command} --help`."
    except Exception as error:  # noqa: BLE001 (a traceback is no message)
        code, said = _failure(error)
        if code == 1 and said:
            said += "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            said += "" if debug else "; run it again with --debug to see where."
        trace = traceback.format_exc() if debug else ""
    if said:
        say(f"error: {bounded(said)}\n")
    say(trace)
    if not is_read(sys.stdout):
        code = code or 1
    sys.exit(code)


def _failure(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that is neither midtune's nor Typer's; no message if nobody reads stdout."""
    if isinstance(error, BrokenPipeError) and not is_read(sys.stdout):
        return 1, ""
    if not isinstance(error, PermissionError) and (lack := lack_of(error)) is not None:
        return RunStopped.exit_code, f"midtune could not go on because {lack}, then do it again."
    if isinstance(error, OSError) and error.filename is not None:
        # A given path is too long, unreadable, or a folder in place of a file.
        named = one_line(str(error.filename))
        return 2, f"{named} cannot be used: {error.strerror}; give another path or fix it."
    return 1, f"unexpected {type(error).__name__}: {one_line(str(error)) or 'no message'}"
