"""`midtune init`: write a recipe for someone's own data, after a look at the data and at the card."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from midtune.config import RunConfig, load_config, with_settings
from midtune.device import reachable_bytes, resolve_device
from midtune.errors import InputError, MidtuneError
from midtune.report.terminal import Terminal
from midtune.stages.opening import read_task
from midtune.tasks import Task
from midtune.tasks.sources.files import ANSWER_COLUMNS, PROMPT_COLUMNS, data_suffix, read_path
from midtune.tasks.sources.hub_dataset import is_dataset, read_dataset
from midtune.whole import require_writable, write_bytes

# From the largest: the first whose training fits a card as configured is offered.
OFFERED = ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B")
OFFERED_ON_CPU = "smollm2-135m"
# Characters of a token at the least, so that plans are rather too large.
TOKEN_CHARACTERS = 3
# Longer answers are worked solutions, and the model needs as much room.
SHORT_ANSWER = 80


def run(
    data: str | None,
    *,
    prompt_column: str | None,
    answer_column: str | None,
    reward: str | None,
    model: str | None,
    gpu: str | None,
    out: Path,
    terminal: Terminal,
) -> dict[str, Any]:
    """Ask for what was not given, on a terminal, and write a recipe; elsewhere the defaults answer.

    Returns the `file`, its `model` and `task`, the number of `problems` to train on, the longest `question_characters`
    and `answer_characters`, the `card`, and the `changes` that make it fit there (null: unknown, or none do).

    Raises InputError if `out` exists, or the data cannot be read.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another file with --out.")
    require_writable(out)
    what = "What to learn: a data file, a task file in Python, a hub dataset, or a name from `midtune tasks`"
    data = data or terminal.ask(what, "reasoning-gym:chain_sum")
    settings: dict[str, Any] = {"task.name": data}
    is_data = bool(data_suffix(data)) or Path(data).is_dir() or is_dataset(data)
    if is_data:
        read = read_dataset(data) if is_dataset(data) else read_path(data)
        names = list(dict.fromkeys(name for line in read.lines[:1000] for name in line.row or ()))
        for role, given, usual in (
            ("prompt", prompt_column, PROMPT_COLUMNS),
            ("answer", answer_column, ANSWER_COLUMNS),
        ):
            known = next((name for name in usual if name in names), "")
            if column := given or terminal.ask(f"Column of the {role}, of {', '.join(names)}", known):
                settings[f"task.{role}_column"] = column
    task, settings = _read(settings, terminal)
    if is_data or reward:
        settings["task.reward"] = reward or terminal.ask("Reward", task.reward.__name__)
    gpu = gpu or _card()
    model = model or terminal.ask("Model: a hub id, a folder or a GGUF file", _offered(gpu))
    questions, answers = ([len(row[key] or "") for row in task.train] for key in ("question", "answer"))
    settings |= {"model.name": model, "task.eval_size": len(task.held_out)}
    tokens = 2 * median(answers) / TOKEN_CHARACTERS if median(answers) > SHORT_ANSWER else 256
    settings["training.max_new_tokens"] = 2 ** math.ceil(math.log2(tokens))
    if settings.get("task.reward") in ("math", "numeric"):
        settings["task.template"] = "boxed"
    changes = _changes(settings, gpu, math.ceil(max(questions) / TOKEN_CHARACTERS), terminal)
    config = load_config(None, settings | (changes or {}))
    found = (
        f"{len(task.train)} problems to train on, questions of up to {max(questions)} characters, answers of "
    )
    found += f"{median(answers):.0f} (median) to {max(answers)}. Planned for: {gpu}."
    write_bytes(out, _text(config, out, found, [*settings, *(changes or {})]).encode())
    return {
        "file": str(out),
        "model": model,
        "task": data,
        "problems": len(task.train),
        "question_characters": max(questions),
        "answer_characters": max(answers),
        "card": gpu,
        "changes": changes,
    }


def _read(settings: dict[str, Any], terminal: Terminal) -> tuple[Task, dict[str, Any]]:
    """The task, and its settings; unusable rows are left out, if there are some."""
    try:
        return read_task(load_config(None, settings)), settings
    except InputError:
        settings = settings | {"task.bad_rows": "drop"}
        task = read_task(load_config(None, settings))
    terminal.message(task.note or "some rows cannot be used")
    return task, settings


def _card() -> str:
    """The memory that is free on this machine's card, as `--gpu` takes it; `cpu` without one."""
    device = resolve_device("auto")
    return f"{reachable_bytes(device) // 2**30}GB" if device.type == "cuda" else "cpu"


def _offered(gpu: str) -> str:
    from midtune.planning.search import planner_of
    from midtune.planning.step_size import work_of

    if gpu == "cpu":
        return OFFERED_ON_CPU
    for name in OFFERED:
        config = with_settings(RunConfig(), {"model.name": name})
        if planner_of(config, gpu).fitting(work_of(config, 256)) == {}:
            break
    return name


def _changes(
    settings: dict[str, Any], gpu: str, prompt_tokens: int, terminal: Terminal
) -> dict[str, Any] | None:
    """The changes of settings that make the run fit; None if it is not known, or none do."""
    from midtune.planning.search import planner_of
    from midtune.planning.step_size import work_of

    config = load_config(None, settings)
    try:
        changes = planner_of(config, gpu).fitting(work_of(config, prompt_tokens))
    except MidtuneError as error:
        terminal.message(f"what fits is not known: {error}")
        return None
    if changes is None:
        terminal.message(f"{config.model.name} does not fit {gpu}; name a smaller one with --model")
    return changes


def _text(config: RunConfig, out: Path, found: str, keys: list[str]) -> str:
    import yaml

    parts: dict[str, dict[str, Any]] = {"model": {}, "task": {}, "blocks": {"top_k": 1}, "training": {}}
    values = config.model_dump(mode="json")
    # Those that most people change are named, too.
    for key in dict.fromkeys(
        [*keys, *(f"training.{name}" for name in "steps lr prompts_per_step group_size".split())]
    ):
        part, _, name = key.partition(".")
        parts[part][name] = values[part][name]
    text = yaml.safe_dump(parts, sort_keys=False, allow_unicode=True)
    lr = "  lr: 5.0e-06"  # the default
    why = "  # The study's, for 512 completions a step; in batches of 64, SmolLM2-135M learned at 4e-4.\n"
    return f"# midtune train --recipe {out}\n#\n# {found}\n" + text.replace(lr, why + lr)
