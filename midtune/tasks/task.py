"""A task: prompts, right answers, and how completions are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.tasks.code import CODE, code_reward, code_row
from midtune.tasks.environment import MAX_TURNS, Game, check_environment, reward_of, told_apart
from midtune.tasks.games.games import GAMES, draw_games, game_arguments
from midtune.tasks.prompts import prompted
from midtune.tasks.rewards import (
    BUILT_IN,
    SHAPING,
    Reward,
    Weighted,
    built_in,
    default_reward,
    solved,
    with_weight,
)
from midtune.tasks.sandbox.sandbox import Sandbox
from midtune.tasks.sources import gym, hub_dataset, programs
from midtune.tasks.sources.columns import Columns, Problems, is_file_name, problems_of
from midtune.tasks.sources.files import FORMATS, Line, Source, read_path
from midtune.tasks.sources.own import (
    TRL_NAMES,
    is_own,
    is_task_file,
    load_own_task,
    load_reward,
    with_own_columns,
)
from midtune.tasks.split import Row, Split, given_split, split_rows


@dataclass(frozen=True)
class Task:
    """Problems to learn from, problems held out, and the functions that score completions.

    Rows have `prompt` (chat messages, or a text to continue), `question` and `answer` (text); what else they have is
    for the rewards.
    """

    name: str
    fingerprint: str  # the same for the same problems and reward, whatever seed and sizes
    train: list[Row]
    held_out: list[Row]
    reward: Reward  # what training maximises
    score: Reward  # what evaluation reports, in [0, 1]; a person's own reward as it is
    own_reward: bool = False
    columns: tuple[str, ...] = ()  # of the file, which a person's own reward gets
    game: Game | None = None  # how it is played, if in turns
    note: str | None = None  # a remark for the person, such as fewer problems than asked for


@dataclass(frozen=True)
class _Problems:
    """What a kind of task gives: its split, its own reward, the one to use by default, and what identifies it."""

    split: Split
    verifier: Reward | None
    default: str
    identity: dict[str, Any]
    notes: Sequence[str] = ()
    own: Sequence[Row] = ()  # the rows as they stand in the file
    environment: Any = None
    max_turns: int = MAX_TURNS


def load_task(
    name: str,
    *,
    args: Mapping[str, Any],
    reward: str | Sequence[str] | None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    template: str | None = None,
    prompt_format: str = "chat",
    eval_file: str | None = None,
    bad_rows: str = "stop",
    last_turn: str = "stop",
    train_size: int,
    eval_size: int,
    seed: int,
    sandbox: Callable[[], Sandbox] | None = None,
    shaping: Callable[[str], Reward] | None = None,
    max_turns: int | None = None,
    turn_tokens: int | None = None,
    tools: Callable[[str, Callable[[], Any]], Callable[[Any], Any]] | None = None,
) -> Task:
    """The task called `name`, split into training and held-out problems.

    Args:
        name: `reasoning-gym:NAME`, `tiny-programs`, `frozen-lake`, `textworld`, a data file (jsonl, csv, parquet …), a
            folder of them, a hub dataset (`org/name` or `org/name:CONFIGURATION`), or a task file in Python (`own.py`).
        args: parameters of a reasoning-gym dataset or a game.
        reward: `exact`, `numeric`, `math`, `verifier`, `code`, `code-all`, `format`, `length`, `repetition` or
            `path/to/file.py:function`, each with `=WEIGHT` or without; several are added up. None: the default.
        prompt_column: column of a file that holds the prompt; None finds it.
        answer_column: column of a file that holds the answer; None finds it.
        system_prompt: system message of every prompt, in place of a prompt's own one.
        template: `boxed`, `r1` or `question` (`prompts.py`).
        prompt_format: `chat` for chat messages, `plain` for text that the model continues.
        eval_file: a file with the held-out problems.
        bad_rows: `stop` refuses rows that cannot be used, `drop` leaves them out.
        last_turn: of a conversation that ends in the assistant's answer: `stop` refuses it, `cut` leaves that turn out.
        train_size: most training problems.
        eval_size: most held-out problems.
        seed: fixes the problems and the split.
        sandbox: opens where programs run; the rewards `code` and `code-all` need it.
        shaping: from the name of a reward that shapes completions, that reward.
        max_turns, turn_tokens: of an episode, see `Game`; None: as many turns as the task is known by.
        tools: from the name and the class of an environment, how a policy calls its methods; None: it acts by text.

    Raises:
        InputError: the task, an argument, a column or the reward does not exist, rows cannot be used, questions
            are in training and evaluation, there are too few problems, or programs cannot be run here.
    """
    asked = _asked_rewards(reward)
    judges = [text for text in asked if text not in SHAPING]
    own = {text: load_reward(text) for text in asked if is_own(text)}
    is_code = any(text in CODE for text in asked)
    if is_code and name.startswith(gym.PREFIX):
        raise InputError(
            f"the reward `code` needs tests, which {name} does not have; use verifier, or a file with tests."
        )
    columns = Columns(
        "prompt" if is_code else prompt_column,
        "answer" if is_code else answer_column,
        needs_answer=not own.keys() & judges[:1] and not is_code,
        prepare=partial(code_row, prompt_column=prompt_column or "prompt") if is_code else None,
        carried=("tests",) if is_code else (),
        drop=bad_rows == "drop",
        cut=last_turn == "cut",
    )
    sizes = {"train_size": train_size, "eval_size": eval_size, "seed": seed}
    found = _problems(name, args, columns, eval_file, judges, sizes, tools=tools is not None)
    weights = asked or {found.default: 1.0}
    judge = judges[0] if judges else found.default
    if "verifier" in weights and found.verifier is None:
        raise InputError(
            f"the reward `verifier` exists for reasoning-gym tasks and task files with a `reward` only, and {name} "
            "is neither; use exact, numeric, math, code or path/to/file.py:function."
        )
    if found.own:
        own = {text: (with_own_columns(mine, found.own), digest) for text, (mine, digest) in own.items()}
    opened = sandbox() if sandbox is not None and weights.keys() & {*CODE} else None
    parts = {
        text: own[text][0] if text in own else _reward(text, found.verifier, opened, shaping)
        for text in weights
    }
    whole = parts[judge] if weights == {judge: 1.0} else Weighted(parts.values(), weights.values())
    is_own_reward = judge in own or (judge == "verifier" and is_task_file(name))
    digests = {text: digest for text, (_, digest) in own.items()}
    identity: dict[str, Any] = {
        "system": system_prompt,
        "format": prompt_format,
        "own": digests.get(judge, ""),
        **found.identity,
        "reward": "own" if judge in own else judge,
    }
    if is_code and "columns" in identity:
        identity["columns"] = [prompt_column or "prompt", answer_column or "answer"]
    # Said only where it is so, that other tasks keep their fingerprints.
    if template is not None:
        identity["template"] = template
    if columns.cut:
        identity["last_turn"] = last_turn
    if whole is not parts[judge]:
        identity["rewards"] = [[digests.get(text, text), weight] for text, weight in weights.items()]
    game = None
    if found.environment is not None:
        title = f"the environment of {name}"
        speech = tools and tools(title, found.environment)
        turns = max_turns or found.max_turns
        game = Game(title, found.environment, turns, turn_tokens, speech)
        identity["turns"] = [turns, turn_tokens, *(["tools"] if tools else [])]
    put = partial(prompted, template=template, system_prompt=system_prompt, prompt_format=prompt_format)
    warning = None if opened is None else opened.warning
    own_names = tuple(dict.fromkeys(key for row in found.own for key in row)) if own or is_own_reward else ()
    notes = [*found.notes, _note(found.split, train_size, eval_size), _shadowed(own_names), warning]
    return Task(
        name=name,
        fingerprint=_fingerprint(identity),
        train=[put(row) for row in found.split.train],
        held_out=[put(row) for row in found.split.held_out],
        reward=whole,
        score=parts[judge] if is_own_reward else solved(parts[judge]),
        own_reward=is_own_reward,
        columns=tuple(name for name in own_names if name not in TRL_NAMES),
        game=game,
        note=" ".join(filter(None, notes)) or None,
    )


def _problems(
    name: str,
    args: Mapping[str, Any],
    columns: Columns,
    eval_file: str | None,
    judges: Sequence[str],
    sizes: Mapping[str, int],
    tools: bool,
) -> _Problems:
    if name.startswith(gym.PREFIX):
        _refuse_evaluation(name, eval_file)
        split, verifier, complete = gym.draw_problems(name.removeprefix(gym.PREFIX), args, **sizes)
        return _Problems(_bare(split), verifier, "verifier", {"name": name, "args": complete})
    is_data = is_task_file(name) or is_file_name(name) or hub_dataset.is_dataset(name)
    if args and (name == programs.NAME or is_data):
        kind = "is a file or dataset and takes" if is_data else "takes"
        raise InputError(f"{name} {kind} no arguments, but {dict(args)} was given; leave it out.")
    if name in GAMES:
        _refuse_evaluation(name, eval_file)
        complete = game_arguments(name, args)
        known = GAMES[name]
        judge = reward_of(known.environment, name, judges)
        split = draw_games(name, complete, **sizes)
        identity = {"name": name, "args": complete}
        return _Problems(
            split, judge, "verifier", identity, environment=known.environment, max_turns=known.max_turns
        )
    if name == programs.NAME:
        _refuse_evaluation(name, eval_file)
        return _Problems(programs.draw_programs(**sizes), None, "code", {"name": name})
    if is_task_file(name):
        mine = load_own_task(name)
        if mine.environment is not None:
            check_environment(mine.environment, name, tools=tools)
            judge = reward_of(mine.environment, name, judges, mine.reward)
            asked = replace(columns, needs_answer=False, carried=None)
            found = _of_source(mine.source, asked, eval_file, sizes, judge, in_turns=True)
            return replace(found, environment=mine.environment)
        judged = mine.reward is not None and (not judges or judges[0] == "verifier")
        asked = replace(columns, needs_answer=columns.needs_answer and not judged)
        return _of_source(mine.source, asked, eval_file, sizes, mine.reward)
    if is_data:
        source = hub_dataset.read_dataset(name) if hub_dataset.is_dataset(name) else read_path(name)
        return _of_source(source, columns, eval_file, sizes)
    raise InputError(_unknown(name))


def _of_source(
    source: Source,
    columns: Columns,
    eval_file: str | None,
    sizes: Mapping[str, int],
    verifier: Reward | None = None,
    in_turns: bool = False,
) -> _Problems:
    def read(source: Source, lines: Sequence[Line], first: int = 0) -> Problems:
        problems = problems_of(source, lines, columns, first)
        # Episodes with one prompt differ by the other columns, such as a seed.
        return replace(problems, rows=[told_apart(row) for row in problems.rows]) if in_turns else problems

    problems = read(source, source.lines)
    identity = {"file": source.digest, "columns": problems.columns}
    notes = [source.note, problems.note]
    own = problems.own
    apart, evaluation = source, source.evaluation
    if eval_file is not None:
        apart = read_path(eval_file)
        evaluation = apart.lines
        identity["eval_file"] = apart.digest
    if evaluation is None:
        split = split_rows(problems.rows, **sizes)
    else:
        held_out = read(apart, evaluation, len(own))
        own = [*own, *held_out.own]
        split, shared = given_split(problems.rows, held_out.rows, **sizes, drop=columns.drop)
        notes.append(held_out.note)
        if shared:
            notes.append(f"left out {shared} training questions that evaluation has too.")
    default = default_reward([row["answer"] for row in problems.rows])
    own = [] if in_turns else own
    return _Problems(
        split,
        verifier and (with_own_columns(verifier, own) if own else verifier),
        default if verifier is None else "verifier",
        identity,
        [note for note in notes if note],
        own,
    )


def _refuse_evaluation(name: str, eval_file: str | None) -> None:
    if eval_file is not None:
        raise InputError(
            f"{name} draws its own evaluation problems, but the file {eval_file} was given; leave it out."
        )


def _reward(
    text: str,
    verifier: Reward | None,
    sandbox: Sandbox | None,
    shaping: Callable[[str], Reward] | None,
) -> Reward:
    """A reward that is not a person's own, by its name."""
    if text in SHAPING and shaping is not None:
        return shaping(text)
    if text in CODE and sandbox is not None:
        return code_reward(text, sandbox)
    return verifier if text == "verifier" and verifier is not None else built_in(text)


def _asked_rewards(reward: str | Sequence[str] | None) -> dict[str, float]:
    """Name → weight of the rewards asked for, in their order."""
    texts = [reward] if isinstance(reward, str) else reward or []
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


def _bare(split: Split) -> Split:
    # Metadata holds values that no table column can; the verifier keeps its own.
    def bare(item: Row) -> Row:
        answer = "" if item["answer"] is None else str(item["answer"])
        prompt = [{"role": "user", "content": item["question"]}]
        return {"prompt": prompt, "question": item["question"], "answer": answer}

    return Split(
        [bare(item) for item in split.train], [bare(item) for item in split.held_out], split.distinct
    )


def _shadowed(names: Sequence[str]) -> str | None:
    taken = [name for name in names if name in TRL_NAMES]
    if not taken:
        return None
    return (
        f"the reward does not get {', '.join(f'the column `{name}`' for name in taken)}: TRL passes its own under this "
        "name; rename it to use it."
    )


def _note(split: Split, train_size: int, eval_size: int) -> str | None:
    short = len(split.train) < train_size or len(split.held_out) < eval_size
    if split.distinct is None or not short:
        return None
    return (
        f"asked for {train_size} training and {eval_size} held-out problems; the task gave only {split.distinct} "
        f"different ones: {len(split.train)} to train on and {len(split.held_out)} held out."
    )


def _fingerprint(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _unknown(name: str) -> str:
    if not Path(name).suffix and name in gym.list_tasks():
        return f"there is no file {name}; for the reasoning-gym dataset write `{gym.PREFIX}{name}`."
    kind = f"a {Path(name).suffix} file" if Path(name).suffix else "nothing that exists"
    made = ", ".join(f"`{known}`" for known in (programs.NAME, *GAMES))
    return (
        f"the task `{name}` is {kind}; give `{gym.PREFIX}NAME`, {made}, a hub dataset (org/name), a task file in "
        f"Python, or a {FORMATS} file or a folder of them."
    )
