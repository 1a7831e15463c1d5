"""`midtune init`: write a recipe for someone's own data, after a look at the data and at the card."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from midtune.config import RunConfig, load_config, with_settings
from midtune.device import reachable_bytes, resolve_device
from midtune.errors import InputError, MidtuneError
from midtune.planning.search import planner_of
from midtune.planning.step_size import work_of
from midtune.report.terminal import Terminal
from midtune.stages.opening import read_task
from midtune.tasks.sources.files import ANSWER_COLUMNS, PROMPT_COLUMNS, data_suffix, read_path
from midtune.tasks.sources.hub_dataset import is_dataset, read_dataset
from midtune.whole import require_writable, write_bytes

# From the largest: the first whose training fits a card as configured is offered.
OFFERED = ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B")
# Characters of a token at the least, so that plans are rather too large.
TOKEN_CHARACTERS = 3
# Longer answers are worked solutions, and the model needs as much room.
SHORT_ANSWER = 80
# Written down whatever they are, since most people change them.
NAMED = tuple(f"training.{name}" for name in ("steps", "lr", "prompts_per_step", "group_size"))


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

    Returns the `file`, its `model` and `task`, the number of `problems` to train on, the `card`, and the `changes` that
    make the run fit there (null: unknown, or none do). Raises InputError if `out` exists, or the data cannot be read.
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
        columns = ("prompt", prompt_column, PROMPT_COLUMNS), ("answer", answer_column, ANSWER_COLUMNS)
        for role, given, usual in columns:
            known = next((name for name in usual if name in names), "")
            if column := given or terminal.ask(f"Column of the {role}, of {', '.join(names)}", known):
                settings[f"task.{role}_column"] = column
    try:
        task = read_task(load_config(None, settings))
    except InputError:
        # Some rows may be unusable.
        settings["task.bad_rows"] = "drop"
        task = read_task(load_config(None, settings))
        terminal.message(task.note or "some rows were left out")
    if is_data or reward:
        settings["task.reward"] = reward or terminal.ask("Reward", task.reward.__name__)
    device = resolve_device("auto")
    gpu = gpu or (f"{reachable_bytes(device) // 2**30}GB" if device.type == "cuda" else "cpu")
    settings["model.name"] = model or terminal.ask("Model: a hub id, a folder or a GGUF file", _offered(gpu))
    questions, answers = ([len(row[key] or "") for row in task.train] for key in ("question", "answer"))
    tokens = 2 * median(answers) / TOKEN_CHARACTERS if median(answers) > SHORT_ANSWER else 256
    settings |= {
        "task.eval_size": len(task.held_out),
        "training.max_new_tokens": 2 ** math.ceil(math.log2(tokens)),
    }
    if settings.get("task.reward") in ("math", "numeric"):
        settings["task.template"] = "boxed"
    config, changes = load_config(None, settings), None
    try:
        changes = _changes(config, gpu, math.ceil(max(questions) / TOKEN_CHARACTERS))
        if changes is None:
            terminal.message(f"{config.model.name} does not fit {gpu}; name a smaller one with --model")
    except MidtuneError as error:
        terminal.message(f"what fits is not known: {error}")
    found = f"{len(task.train)} problems; questions of up to {max(questions)}, answers of {max(answers)} characters"
    text = _yaml(with_settings(config, changes or {}), [*settings, *(changes or {}), *NAMED])
    write_bytes(out, f"# midtune train --recipe {out}\n#\n# {found}; planned for {gpu}.\n{text}".encode())
    about = {"file": str(out), "model": config.model.name, "task": data, "problems": len(task.train)}
    return {**about, "card": gpu, "changes": changes}


def _offered(gpu: str) -> str:
    if gpu == "cpu":
        return "smollm2-135m"
    models = (with_settings(RunConfig(), {"model.name": name}) for name in OFFERED)
    return next((model.model.name for model in models if _changes(model, gpu, 256) == {}), OFFERED[-1])


def _changes(config: RunConfig, gpu: str, prompt_tokens: int) -> dict[str, Any] | None:
    """The changes of settings that make a run fit; None if none do."""
    return planner_of(config, gpu).fitting(work_of(config, prompt_tokens))


def _yaml(config: RunConfig, keys: list[str]) -> str:
    """These settings as a recipe."""
    import yaml

    parts: dict[str, dict[str, Any]] = {"model": {}, "task": {}, "blocks": {"top_k": 1}, "training": {}}
    values = config.model_dump(mode="json")
    for part, _, name in (key.partition(".") for key in keys):
        parts[part][name] = values[part][name]
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True)
