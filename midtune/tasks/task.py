"""A task: prompts, right answers, and how completions are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from midtune.config import SHAPING, TaskConfig
from midtune.errors import InputError
from midtune.tasks.code import CODE, code_reward, code_row
from midtune.tasks.environment import MAX_TURNS, Game, check_environment, reward_of
from midtune.tasks.games.table import GAMES, draw_games
from midtune.tasks.prompts import prompted
from midtune.tasks.rewards import BUILT_IN, Reward, Weighted, built_in, default_reward, solved, with_weight
from midtune.tasks.sandbox.sandbox import Sandbox
from midtune.tasks.sources import gym, programs
from midtune.tasks.sources.columns import Columns, problems_of
from midtune.tasks.sources.files import FORMATS, Source, data_suffix, read_path
from midtune.tasks.sources.hub_dataset import is_dataset, read_dataset
from midtune.tasks.sources.own import (
    TRL_NAMES,
    is_own,
    is_task_file,
    load_own_task,
    load_reward,
    with_own_columns,
)
from midtune.tasks.split import Row, Sizes, Split, given_split, split_rows

# (environment's name, its class) → (policy → how it calls the environment's methods).
Tools = Callable[[str, Callable[[], Any]], Callable[[Any], Any]]


@dataclass(frozen=True)
class Task:
    """Problems to learn from, problems held out, and the functions that score completions.

    Rows have `prompt` (chat messages, or a text to continue), `question`, `answer` (text), and keys for the rewards.
    """

    name: str
    fingerprint: str  # equal for equal problems and reward, whatever the seed and sizes
    train: list[Row]
    held_out: list[Row]
    reward: Reward  # what training maximises
    score: Reward  # what evaluation reports, in [0, 1]; a person's own reward unchanged
    own_reward: bool = False
    columns: tuple[str, ...] = ()  # file columns that a person's own reward gets
    game: Game | None = None  # how it is played, if in turns
    note: str | None = None  # a remark for the person, such as fewer problems than asked for

    def require_one_turn(self, what: str) -> None:
        """Raise InputError if the task is played in turns, which `what` (a command or option) does not support."""
        if self.game is not None:
            raise InputError(f"{self.name} is played in turns, and {what} knows tasks of one turn only.")


@dataclass(frozen=True)
class _Problems:
    """What a source gives; `verifier` is its own reward, `default` names the one to use by default."""

    split: Split
    verifier: Reward | None
    default: str
    identity: dict[str, Any]
    notes: Sequence[str] = ()
    own: Sequence[Row] = ()  # the rows as in the file
    environment: Any = None
    max_turns: int = MAX_TURNS


def load_task(
    name: str,
    settings: TaskConfig,
    seed: int,
    *,
    sandbox: Callable[[], Sandbox] | None = None,
    shaping: Callable[[str], Reward] | None = None,
    tools: Tools | None = None,
) -> Task:
    """Load the task called `name`, split into training and held-out problems.

    Args:
        settings: all but `TaskConfig.name`, whose docs say what a name can be.
        sandbox: opens where programs run; the rewards `code` and `code-all` need it.
        shaping: makes a shaping reward from its name.
        tools: how a policy calls the methods of an environment; None: it acts by text.

    Raises:
        InputError: an unknown name, argument, column or reward, unusable, shared or too few rows, or no sandbox.
    """
    weights = _asked_rewards(settings.reward or [])
    judges = [text for text in weights if text not in SHAPING]
    own = {text: load_reward(text) for text in weights if is_own(text)}
    columns = _columns(name, settings, judges)
    sizes = Sizes(settings.train_size, settings.most_held_out, seed)
    found = _problems(name, settings, sizes, columns, judges, tools=tools is not None)
    weights = weights or {found.default: 1.0}
    if "verifier" in weights and found.verifier is None:
        raise InputError(
            f"the reward `verifier` exists for reasoning-gym tasks and task files with a `reward` only, and {name} "
            "is neither; use exact, numeric, math, code or path/to/file.py:function."
        )
    opened = sandbox() if sandbox is not None and not weights.keys().isdisjoint(CODE) else None

    def opened_reward(text: str) -> Reward:
        if text in own:
            return with_own_columns(own[text][0], found.own)
        if text in SHAPING and shaping is not None:
            return shaping(text)
        if text in CODE and opened is not None:
            return code_reward(text, opened)
        return found.verifier if text == "verifier" and found.verifier is not None else built_in(text)

    parts = {text: opened_reward(text) for text in weights}
    judge = judges[0] if judges else found.default
    is_sum = weights != {judge: 1.0}
    is_own_reward = judge in own or (judge == "verifier" and is_task_file(name))
    game = None
    if (made := found.environment) is not None:
        title = f"the environment of {name}"
        speech = tools and tools(title, made)
        game = Game(title, made, settings.max_turns or found.max_turns, settings.turn_tokens, speech)
    digests = {text: digest for text, (_, digest) in own.items()}
    identity = _identity(settings, found, game, judge, digests)
    if is_sum:
        identity["rewards"] = [[digests.get(text, text), weight] for text, weight in weights.items()]
    own_names = dict.fromkeys(key for row in found.own for key in row) if own or is_own_reward else {}
    notes = [
        *found.notes,
        _note(found.split, sizes),
        _shadowed(own_names),
        opened.warning if opened else None,
    ]
    return Task(
        name=name,
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        train=[prompted(row, settings) for row in found.split.train],
        held_out=[prompted(row, settings) for row in found.split.held_out],
        reward=Weighted(parts.values(), weights.values()) if is_sum else parts[judge],
        score=parts[judge] if is_own_reward else solved(parts[judge]),
        own_reward=is_own_reward,
        columns=tuple(name for name in own_names if name not in TRL_NAMES),
        game=game,
        note=" ".join(filter(None, notes)) or None,
    )


def _asked_rewards(texts: Sequence[str]) -> dict[str, float]:
    """Name → weight of the rewards asked for, in their order."""
    pairs = [with_weight(text) for text in texts]
    for text, _ in pairs:
        if text not in BUILT_IN and not is_own(text):
            raise InputError(
                f"there is no reward `{text}`; the rewards are {', '.join(BUILT_IN)}, or path/to/file.py:function."
            )
    asked = dict(pairs)
    if len(asked) < len(pairs):
        raise InputError(f"a reward was asked for twice in {', '.join(texts)}; name each once.")
    if asked and {*asked} <= {*SHAPING}:
        raise InputError(
            f"{', '.join(asked)} shapes completions but judges no answers; add a reward that does, such as math."
        )
    return asked


def _columns(name: str, settings: TaskConfig, judges: Sequence[str]) -> Columns:
    if not any(text in CODE for text in judges):
        return Columns(settings, needs_answer=not (judges and is_own(judges[0])))
    if name.startswith(gym.PREFIX):
        raise InputError(
            f"the reward `code` needs tests, which {name} does not have; use verifier, or a file with tests."
        )
    prepare = partial(code_row, prompt_column=settings.prompt_column or "prompt")
    made = settings.model_copy(update={"prompt_column": "prompt", "answer_column": "answer"})
    return Columns(made, needs_answer=False, prepare=prepare, carried=("tests",))


def _problems(
    name: str, settings: TaskConfig, sizes: Sizes, columns: Columns, judges: Sequence[str], *, tools: bool
) -> _Problems:
    args, eval_file = settings.args, settings.eval_file
    is_gym = name.startswith(gym.PREFIX)
    if eval_file is not None and (is_gym or name in GAMES or name == programs.NAME):
        raise InputError(
            f"{name} draws its own evaluation problems, but the file {eval_file} was given; leave it out."
        )
    if is_gym:
        split, verifier, complete = gym.draw_problems(name.removeprefix(gym.PREFIX), args, sizes)
        return _Problems(split, verifier, "verifier", {"name": name, "args": complete})
    if name in GAMES:
        kind = GAMES[name]
        verifier = reward_of(kind.environment, name, judges)
        split, complete = draw_games(name, args, sizes)
        identity = {"name": name, "args": complete}
        return _Problems(
            split, verifier, "verifier", identity, environment=kind.environment, max_turns=kind.max_turns
        )
    is_file = bool(data_suffix(name)) or Path(name).expanduser().exists()
    is_data = is_task_file(name) or is_file or is_dataset(name)
    if args and (name == programs.NAME or is_data):
        what = "is a file or dataset and takes" if is_data else "takes"
        raise InputError(f"{name} {what} no arguments, but {dict(args)} was given; leave it out.")
    if name == programs.NAME:
        return _Problems(programs.draw_programs(sizes), None, "code", {"name": name})
    if is_task_file(name):
        mine = load_own_task(name)
        own_reward = mine.reward
        if mine.environment is not None:
            check_environment(mine.environment, name, tools=tools)
            own_reward = reward_of(mine.environment, name, judges, mine.reward)
            columns = replace(columns, needs_answer=False, carried=None)
        elif own_reward is not None and (not judges or judges[0] == "verifier"):
            columns = replace(columns, needs_answer=False)
        found = _of_source(mine.source, columns, settings, sizes, own_reward)
        return replace(found, environment=mine.environment)
    if is_data:
        source = read_dataset(name) if is_dataset(name) else read_path(name)
        return _of_source(source, columns, settings, sizes)
    raise InputError(_unknown(name))


def _of_source(
    source: Source, columns: Columns, settings: TaskConfig, sizes: Sizes, verifier: Reward | None = None
) -> _Problems:
    """The problems of a file, a folder, a hub dataset or a person's own rows."""
    problems = problems_of(source.name, source.lines, columns)
    identity: dict[str, Any] = {"file": source.digest, "columns": problems.columns}
    if columns.prepare is not None:
        identity["columns"] = [settings.prompt_column or "prompt", settings.answer_column or "answer"]
    notes = [source.note, problems.note]
    own = problems.own
    apart, evaluation = source, source.evaluation
    if settings.eval_file is not None:
        apart = read_path(settings.eval_file)
        evaluation = apart.lines
        identity["eval_file"] = apart.digest
    if evaluation is None:
        split = split_rows(problems.rows, sizes)
    else:
        held_out = problems_of(apart.name, evaluation, columns, len(own))
        own = [*own, *held_out.own]
        split = given_split(problems.rows, held_out.rows, sizes, drop=settings.bad_rows == "drop")
        notes.append(held_out.note)
        if split.left_out:
            notes.append(f"left out {split.left_out} training questions that evaluation has too.")
    default = "verifier" if verifier else default_reward([row["answer"] for row in problems.rows])
    return _Problems(split, verifier and with_own_columns(verifier, own), default, identity, notes, own)


def _identity(
    settings: TaskConfig, found: _Problems, game: Game | None, judge: str, digests: Mapping[str, str]
) -> dict[str, Any]:
    """What the fingerprint covers; `digests` are those of a person's own rewards."""
    identity = {
        "system": settings.system_prompt,
        "format": settings.prompt_format,
        "own": digests.get(judge, ""),
        **found.identity,
        "reward": "own" if judge in digests else judge,
    }
    # Added only when set, so that other tasks keep their fingerprints.
    if settings.template != "none":
        identity["template"] = settings.template
    if settings.last_turn == "cut":
        identity["last_turn"] = settings.last_turn
    if game is not None:
        identity["turns"] = [game.max_turns, game.turn_tokens, *(["tools"] if game.speech else [])]
    return identity


def _shadowed(names: Mapping[str, None]) -> str | None:
    """Warn of columns that a person's own reward does not get, if any."""
    taken = ", ".join(f"the column `{name}`" for name in names if name in TRL_NAMES)
    if not taken:
        return None
    return f"the reward does not get {taken}: TRL passes its own under this name; rename it to use it."


def _note(split: Split, sizes: Sizes) -> str | None:
    short = len(split.train) < sizes.train or len(split.held_out) < sizes.held_out
    if split.distinct is None or not short:
        return None
    return (
        f"asked for {sizes.train} training and {sizes.held_out} held-out problems; the task gave only "
        f"{split.distinct} different ones: {len(split.train)} to train on and {len(split.held_out)} held out."
    )


def _unknown(name: str) -> str:
    if not Path(name).suffix and name in gym.list_tasks():
        return f"there is no file {name}; for the reasoning-gym dataset write `{gym.PREFIX}{name}`."
    kind = f"a {Path(name).suffix} file" if Path(name).suffix else "nothing that exists"
    made = ", ".join(f"`{known}`" for known in (programs.NAME, *GAMES))
    return (
        f"the task `{name}` is {kind}; give `{gym.PREFIX}NAME`, {made}, a hub dataset (org/name), a task file in "
        f"Python, or a {FORMATS} file or a folder of them."
    )
