"""The tables of the commands: what can be typed for each, and what shows its result.

To give a command another setting as an option, add the setting's name to one of its panels: help, type, choices and
default come from config.py. A new command is a row of `COMMANDS`, a file in stages/ and a printer in report/.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from midtune.config import MOST_TOKENS, PLANNED_CARD, PLANNED_PROMPT_TOKENS, SETTINGS

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
    "task.eval_size": _setting("task.eval_size", metavar="N|auto"),
    "reward": _setting("task.reward", metavar="NAME[=WEIGHT]"),
    "resume": _switch("continue a run exactly; its folder is MODEL or --out", "stage"),
    "recipe": Parameter(
        Path,
        "a YAML file of settings, or a name from `midtune recipes`; options override it",
        "FILE|NAME",
        reader="config",
    ),
    "set": Parameter(
        list[str], "any key of a recipe, such as training.top_p=0.9; repeatable", "KEY=VALUE", reader="config"
    ),
    "offline": _switch("download nothing, use what is on this machine"),
    "dry_run": _switch("say what the run would do, and load and fetch nothing"),
    "out": Parameter(Path, "folder for what the command leaves (default: runs/NAME)"),
    "json": _switch("print the result as one JSON object"),
    "quiet": _switch("no progress and no messages"),
    "debug": _switch("show the traceback of an unexpected error"),
    "train.devices": Parameter(
        int,
        "processes on this machine that share each step: a card each",
        "N",
        reader="cli",
        checks={"min": 1},
    ),
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
    "try.target": Parameter(str, "a run folder or a patch folder", "RUN", REQUIRED),
    "try.base": _switch("the base model alone", "stage"),
    "try.n": Parameter(int, "answer so many held-out problems, and ask for nothing", "N", checks={"min": 1}),
    "try.temperature": Parameter(
        float,
        "0: the likeliest token each time; both models draw with the same numbers",
        default=0.0,
        checks={"min": 0},
    ),
    "probe.on": Parameter(
        str,
        "run the trials on a Ray cluster, many at a time: the one this machine is in, else one started here; or that "
        "of an address",
        "ray|ray://HOST:PORT",
    ),
    "plan.gpu": Parameter(str, "the card: memory or name; or cpu", "24GB|NAME|cpu", PLANNED_CARD),
    "plan.devices": _count("cards that share each step", 1),
    "plan.prompt_tokens": _count("tokens of the longest prompt", PLANNED_PROMPT_TOKENS),
    "plan.new_tokens": _setting("training.max_new_tokens", "--new-tokens"),
    "merge.target": Parameter(Path, "the folder of a run", "RUN", REQUIRED),
    "merge.out": Parameter(Path, "folder for the checkpoint", default=REQUIRED),
    "push.target": Parameter(str, "a run folder or a patch folder", "RUN", REQUIRED),
    "push.repository": Parameter(str, "the repository, which is created if needed", "ORG/NAME", REQUIRED),
    "push.export": Parameter(
        Path, "send this folder or file that `midtune export` wrote, not the patch", "PATH"
    ),
    "push.token_file": Parameter(Path, "a file that holds the token", "FILE"),
    "push.token_env": Parameter(str, "the environment variable that holds the token", "NAME"),
    "push.public": _switch("let everyone see it", "stage"),
    "push.dry_run": _switch("write the folder that would be sent, and send nothing", "stage"),
    "push.out": Parameter(Path, "that folder (default: NAME here)"),
    "export.target": Parameter(Path, "the folder of a run, or its patch", "RUN", REQUIRED),
    "export.out": Parameter(Path, "a new folder; for gguf also a file", default=REQUIRED),
    "export.to": Parameter(
        str, "4-bit as trained, unquantized, or a GGUF with the blocks in it", "nf4|hf|gguf", REQUIRED
    ),
    "export.base": Parameter(
        Path, "the GGUF to put the blocks into (default: the one the run was loaded from)", "FILE"
    ),
    "export.dtype": Parameter(
        str,
        "of the weights; file: of each its own in the GGUF (default: the checkpoint's, if the model computes in it)",
        "bf16|fp16|fp32|file",
    ),
    "export.score": Parameter(
        bool,
        "score it on the run's held-out problems (default: yes)",
        default=True,
        flag="--score/--no-score",
    ),
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
    "bench.until": Parameter(
        str,
        "train the arms on the task instead, for so many steps (60) or until a held-out score (0.45 or 45%), and "
        "compare what they learn in the same time; settings are the recipe's",
        "STEPS|SCORE",
    ),
    "bench.rates": _count("with --until: learning rates tried for each arm, a factor of 3 apart", 3),
    "bench.every": Parameter(
        int, "with --until: steps between scorings (default: a sixth of all)", "N", checks={"min": 1}
    ),
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
    "init.data": Parameter(str, "what to learn; asked for without it", "DATA"),
    "init.prompt_column": replace(_setting("task.prompt_column"), reader="stage"),
    "init.answer_column": replace(_setting("task.answer_column"), reader="stage"),
    "init.reward": Parameter(str, "the reward (default: the one that suits the answers)", "NAME"),
    "init.model": Parameter(str, "the model (default: the largest of a few that fits)", "MODEL"),
    "init.gpu": Parameter(str, "the card (default: what is free on this machine's)", "24GB|NAME|cpu"),
    "init.out": Parameter(Path, "the recipe", "FILE", Path("recipe.yaml")),
    "recipes.action": Parameter(str, "`show` or `copy` one of them", "show|copy"),
    "recipes.name": Parameter(Path, "its name", "NAME"),
    "recipes.out": Parameter(Path, "where the copy goes (default: NAME.yaml here)", "FILE"),
}


@dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`.

    Args:
        summary: its line in `midtune --help`; `about` is its own help.
        printer: MODULE.FUNCTION in report/ that shows the stage's result.
        panels: title in the help → names of `PARAMETERS` and keys of settings; a key whose part is the title's goes
            without it. `Output` has those of `EVERY_COMMAND` besides.
        arguments: the method of cli.Given that gives the arguments of the stage's `run`.
        stage: the file in stages/; default: the command's name.
        progress: what is shown meanwhile, where `run` takes no terminal.
    """

    summary: str
    about: str
    example: str
    printer: str
    panels: Mapping[str, str]
    arguments: str = "arguments"
    stage: str = ""
    progress: str = ""

    def parameters(self, command: str) -> dict[str, dict[str, Parameter]]:
        """What can be typed for the command of this name, by panel and Python name."""
        panels = {**self.panels, "Output": f"{self.panels.get('Output', '')} {EVERY_COMMAND}"}

        def known(word: str, panel: str) -> Parameter:
            own = PARAMETERS.get(f"{command}.{word}") or PARAMETERS.get(word)
            return own or _setting(word if word in SETTINGS else f"{panel.lower()}.{word}")

        return {
            panel: {word.replace(".", "_"): known(word, panel) for word in words.split()}
            for panel, words in panels.items()
        }


_TASK = "task_arg reward prompt_column answer_column prompt_format template eval_file"
COMMANDS = {
    "train": Command(
        "train blocks, report what it gained and saved",
        "Train the chosen blocks, score them before and after, and report what was gained and saved.",
        "midtune train smollm2-135m --task reasoning-gym:chain_sum --task-arg min_terms=2 --top-k 1",
        "tables.report_table",
        {
            ARGUMENTS: "model",
            "Model": "quantize device devices adapter experts",
            "Task": f"task {_TASK}",
            "Blocks": "layers top_k probe select",
            "Training": "algorithm steps lr beta prompts_per_step group_size max_new_tokens temperature "
            "fit report_to resume",
            "Evaluation": "task.eval_size samples baseline",
            "Settings": "recipe set seed offline",
            "Output": "dry_run out",
        },
        "for_a_run",
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
            "Probe": "method layers budget seeds full_lr on",
            "Blocks": "top_k",
            "Training": "algorithm steps lr prompts_per_step group_size max_new_tokens temperature resume",
            "Evaluation": "task.eval_size samples",
            "Settings": "recipe set seed offline",
            "Output": "out",
        },
        "for_a_run",
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
        "for_eval",
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
    ),
    "try": Command(
        "talk to a run, beside its base model",
        "Answer prompts with the base model and the trained one, side by side, as the run put them.\n\n"
        "On a terminal, type a prompt, or Enter for a held-out problem with its score. Elsewhere prompts are read from "
        "stdin, a line each; --json prints a line of JSON for each. The model is loaded once.",
        "midtune try runs/tiny\n  echo 'What is 12 + 30?' | midtune try runs/tiny",
        "results.Answers",
        {
            ARGUMENTS: "target",
            "Model": "quantize device",
            "Sampling": "base n temperature training.max_new_tokens",
            "Settings": "set seed offline",
        },
        stage="talk",
    ),
    "plan": Command(
        "say what fits on a card, before anything is loaded",
        "Say how much memory training would take and how long a step at least, for midtune and for TRL.\n\n"
        "Nothing is loaded or downloaded: the model's configuration is enough, and those of common models are shipped.",
        "midtune plan Qwen/Qwen3-8B --gpu 24GB",
        "plans.plan_table",
        {
            ARGUMENTS: "model",
            "Plan": "gpu devices prompt_tokens new_tokens training.group_size training.prompts_per_step",
            "Blocks": "layers top_k",
            "Model": "quantize experts",
            "Settings": "recipe set offline",
        },
        progress="planning {config.model.name}",
    ),
    "merge": Command(
        "write a checkpoint with the trained blocks in place",
        "Write a complete checkpoint: the base model with the trained blocks in place.",
        "midtune merge runs/tiny --out merged",
        "results.export_text",
        {ARGUMENTS: "target", "Output": "out"},
        stage="export",
    ),
    "export": Command(
        "write a run as 4-bit, unquantized or GGUF, and score it",
        "Write the model with the trained blocks in place, in a form that other programs load, and score it.\n\n"
        "nf4 is the model as it was trained and hf the unquantized checkpoint, both for transformers and vLLM. gguf is "
        "for llama.cpp, and needs no unquantized checkpoint.",
        "midtune export runs/tiny --to nf4 --out exported",
        "results.export_text",
        {
            ARGUMENTS: "target",
            "Export": "to base dtype score",
            "Model": "device",
            "Settings": "offline",
            "Output": "out",
        },
    ),
    "push": Command(
        "put a run on the hub, with a model card",
        "Send a run's patch, or an exported form of it, to the hub, with a model card made from its report.\n\n"
        "The repository is private unless --public is given. The token is read only from where you say, never from "
        "HF_TOKEN or a saved login. Nothing else is sent.",
        "midtune push runs/tiny me/tiny-sums --dry-run\n  midtune push runs/tiny me/tiny-sums --token-file token",
        "results.push_text",
        {
            ARGUMENTS: "target repository",
            "Hub": "export token_file token_env public offline",
            "Output": "dry_run out",
        },
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
        "Train the same prompts and completions with midtune and with TRL, and compare time and memory.\n\n"
        "With --until, compare what is learned on a task in the same time. Each run leaves a file in the run folder: "
        "the same command with --out goes on where it stopped.",
        "midtune bench smollm2-135m --arms midtune,trl-full\n"
        "  midtune bench --recipe recipes/smollm2-chain-sum.yaml --until 60",
        "results.bench_table",
        {
            ARGUMENTS: "model",
            "Model": "model_option device",
            "Task": "task task_arg",
            "Settings": "recipe set seed offline",
            "Bench": "arms prompts prompt_tokens new_tokens group_size steps training.micro_batch_tokens profile "
            "until rates every",
            "Blocks": "layers top_k",
            "Output": "out",
        },
        "for_bench",
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
        "for_tasks",
    ),
    "init": Command(
        "write a recipe for your own data",
        "Write a recipe for your own data, after a look at its columns, answers and lengths, and at the card.\n\n"
        "On a terminal, what is not given is asked for: data, columns, reward and model. Elsewhere defaults answer.",
        "midtune init data.jsonl --model Qwen/Qwen3-1.7B --gpu 24GB --out mine.yaml",
        "results.init_text",
        {
            ARGUMENTS: "data",
            "Recipe": "prompt_column answer_column reward model gpu",
            "Output": "offline out",
        },
    ),
    "recipes": Command(
        "list recipes, show one, or start your own from one",
        "List the recipes that come with midtune, with what was measured; show one, or copy it to change it.\n\n"
        "Any --recipe takes such a name in place of a file. A copy brings the task file that it names.",
        "midtune recipes\n  midtune recipes show smollm2-math\n  midtune recipes copy smollm2-math",
        "results.recipes_text",
        {ARGUMENTS: "action name", "Output": "out"},
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
