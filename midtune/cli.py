"""The commands: each reads what was typed, calls one stage and prints its result.

Which commands there are, and what can be typed for each, stands in commands.py.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from midtune import __version__, processes
from midtune.commands import COMMANDS, Command, Parameter
from midtune.config import RunConfig, load_config, parse_assignment, require_task
from midtune.device import show_one_card
from midtune.errors import InputError, MidtuneError, RunStopped, bounded, escaped, lack_of, one_line
from midtune.measure.cards import card_names
from midtune.network import go_offline
from midtune.process import fast_imports, hold_streams, is_read, join_card_memory, quieten_libraries, say

INTERRUPTED = 130
# Table width in a pipe or a file.
PIPE_WIDTH = 100


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
        """The same, and the configuration where the command has options that set it, over the first target."""
        keys = [known.key for known in self.parameters.values() if known.reader == "config"]
        if not keys:
            return self.own()
        target = self["target"] or next(iter(self["targets"] or []), None)
        return {**self.own(), "config": self.config(target, needs_task="task.name" in keys)}

    def config(
        self, target: str | Path | None = None, task: str | None = None, needs_task: bool = True
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
        own, model = _underneath(str(target)) if target is not None else (None, {})
        config = self._loaded(self["recipe"] or own, overrides | model)
        if needs_task:
            require_task(config)
        return config

    def _loaded(self, recipe: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
        """The configuration, and this process made to see the one card that it names, unless Ray gives out cards."""
        config = load_config(recipe, overrides)
        if config.model.device != "cpu" and self["on"] is None:
            show_one_card(config.model.device, len(card_names()))
        return config

    def for_a_run(self) -> dict[str, Any]:
        if not self["resume"]:
            return {**self.arguments(), "resume": None}
        others = [
            known.option(name) for name, known in self.configuring().items() if known.key != "model.name"
        ]
        if others:
            raise InputError(
                f"--resume keeps the settings of the run, but {', '.join(others)} was given too; leave it out."
            )
        folders = [folder for folder in (self["model"], self["out"]) if folder is not None]
        if len(folders) != 1:
            what = "two folders" if folders else "none"
            raise InputError(
                f"--resume needs the folder of one run and got {what}; write `--resume runs/NAME`."
            )
        from midtune.runs import RunFolder

        folder = RunFolder.open(Path(folders[0])).path
        config = self._loaded(folder / "config.yaml", {})
        return {**self.own(), "config": config, "out": None, "resume": folder}

    def for_eval(self) -> dict[str, Any]:
        own = self.own()
        tasks = own.pop("tasks") or [None]
        return {**own, "configs": [self.config(own["target"], task, not own["lm_eval"]) for task in tasks]}

    def for_bench(self) -> dict[str, Any]:
        return {**self.own(), "config": self.config(needs_task=self["until"] is not None)}

    def for_tasks(self) -> dict[str, Any]:
        task, checked, check = self["task"], self["checked"], self["task"] == "check"
        if check and checked is None:
            raise InputError(
                "`midtune tasks check` needs the task to check; add a task file, a data file or a name."
            )
        if not check and checked is not None:
            raise InputError(
                f"one task is shown at a time, but {task} and {checked} were given; leave one out."
            )
        config = self.config(task=checked if check else task, needs_task=False)
        return {"config": config if task or self["recipe"] else None, "check": check}


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
    panels = command.parameters(name)
    parameters = {word: known for here in panels.values() for word, known in here.items()}
    declared = [known.declared(word, panel) for panel, here in panels.items() for word, known in here.items()]

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
    arguments = getattr(given, command.arguments)()
    if given["dry_run"] and given.parameters["dry_run"].reader == "cli":
        command = replace(COMMANDS["plan"], stage="dry_run", printer="plans.dry_run_text")
    if command.stage != "train" and not processes.alone():
        return
    if command.stage == "train" and (given["devices"] or 1) > 1 and processes.count() == 1:
        raise processes.Several(given["devices"])
    from midtune.report.terminal import PlainConsole, PlainStream, Terminal

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    out = PlainConsole(file=sys.stdout, width=width)

    def show(result: Any, indent: int | None = 2) -> None:
        if given["json"]:
            # JSON has no NaN.
            values = json.loads(json.dumps(result, default=str), parse_constant=lambda name: None)
            print(escaped(json.dumps(values, indent=indent, ensure_ascii=False)), file=out.file, flush=True)
        else:
            module, function = command.printer.split(".")
            out.print(getattr(import_module(f"midtune.report.{module}"), function)(result))

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
        if inspect.isgenerator(result):
            for each in result:
                show(each, indent=None)
            return
    if processes.is_main():
        show(result)
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
    join_card_memory()
    trace = ""
    try:
        try:
            code = app(arguments, prog_name="midtune", standalone_mode=False) or 0
            said = "interrupted." if code == INTERRUPTED else ""  # Typer's exit code for Ctrl-C
        except processes.Several as asked:
            code, said = processes.launch(asked.count, main, arguments), ""
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
    # Of errors met before they have joined, every process has the same.
    if said and (processes.is_main() or processes.is_joined()):
        say(f"error: {bounded(said)}\n")
    say(trace)
    if not is_read(sys.stdout):
        code = code or 1
    if processes.is_joined():
        # Taking down a group can wait for ever for a process that has gone.
        os._exit(code)
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
