"""A task: prompts, right answers, and how completions are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.tasks import gym, programs
from midtune.tasks.code import CODE, code_reward, code_row
from midtune.tasks.files import is_file_name, read_problems
from midtune.tasks.own import is_own, load_reward
from midtune.tasks.rewards import BUILT_IN, Reward, built_in, default_reward, solved
from midtune.tasks.sandbox import Sandbox
from midtune.tasks.split import Row, Split, split_rows


@dataclass(frozen=True)
class Task:
    """Problems to learn from, problems held out, and the functions that score completions.

    Rows have `prompt` (chat messages, or a text to continue), `question` and `answer` (text); rows of a
    file also have its other columns.
    """

    name: str
    fingerprint: str  # the same for the same problems and reward, whatever seed and sizes
    train: list[Row]
    held_out: list[Row]
    reward: Reward  # what training maximises
    score: Reward  # what evaluation reports, in [0, 1]; a person's own reward as it is
    own_reward: bool = False
    note: str | None = None  # a remark for the person, such as fewer problems than asked for


def load_task(
    name: str,
    *,
    args: Mapping[str, Any],
    reward: str | None,
    prompt_column: str,
    answer_column: str,
    system_prompt: str | None,
    prompt_format: str = "chat",
    train_size: int,
    eval_size: int,
    seed: int,
    sandbox: Callable[[], Sandbox] | None = None,
) -> Task:
    """The task called `name`, split into training and held-out problems.

    Args:
        name: `reasoning-gym:NAME`, `tiny-programs`, or the path of a jsonl or csv file.
        args: parameters of a reasoning-gym dataset.
        reward: `exact`, `numeric`, `math`, `verifier`, `code`, `code-all`, `path/to/file.py:function`, or None
            for the default.
        prompt_column: column of a file that holds the prompt.
        answer_column: column of a file that holds the answer.
        system_prompt: system message of every prompt, in place of a prompt's own one.
        prompt_format: `chat` for chat messages, `plain` for text that the model continues.
        train_size: most training problems.
        eval_size: most held-out problems.
        seed: fixes the problems and the split.
        sandbox: opens where programs run; the rewards `code` and `code-all` need it.

    Raises:
        InputError: the task, an argument, a column or the reward does not exist, there are too few problems, or
            programs cannot be run here.
    """
    _check_reward_name(reward)
    own, own_digest = load_reward(reward) if reward is not None and is_own(reward) else (None, "")
    identity: dict[str, Any] = {"system": system_prompt, "format": prompt_format, "own": own_digest}
    verifier: Reward | None = None
    if name.startswith(gym.PREFIX):
        short = name.removeprefix(gym.PREFIX)
        split, verifier, complete = gym.draw_problems(
            short, args, train_size=train_size, eval_size=eval_size, seed=seed
        )
        split = _bare(split)
        chosen = reward or "verifier"
        identity |= {"name": name, "args": complete}
    elif args and (name == programs.NAME or is_file_name(name)):
        kind = "is a file and takes" if name != programs.NAME else "takes"
        raise InputError(f"{name} {kind} no arguments, but {dict(args)} was given; leave it out.")
    elif name == programs.NAME:
        split = programs.draw_programs(train_size=train_size, eval_size=eval_size, seed=seed)
        chosen = reward or "code"
        identity |= {"name": name}
    elif is_file_name(name):
        is_code = reward in CODE
        problems = read_problems(
            name,
            prompt_column="prompt" if is_code else prompt_column,
            answer_column="answer" if is_code else answer_column,
            needs_answer=own is None and not is_code,
            prepare=partial(code_row, prompt_column=prompt_column) if is_code else None,
        )
        chosen = reward or default_reward([row["answer"] for row in problems.rows])
        split = split_rows(problems.rows, train_size=train_size, eval_size=eval_size, seed=seed)
        identity |= {"file": problems.digest, "columns": [prompt_column, answer_column]}
    else:
        raise InputError(_unknown(name))
    if chosen == "verifier" and verifier is None:
        raise InputError(
            f"the reward `verifier` exists for reasoning-gym tasks only, and {name} is not one; use exact, "
            "numeric, math, code or path/to/file.py:function."
        )
    if chosen in CODE and verifier is not None:
        raise InputError(
            f"the reward `{chosen}` needs tests, which {name} does not have; use verifier, or a file with tests."
        )
    opened = sandbox() if sandbox is not None and chosen in CODE else None
    function = (
        own
        or (verifier if chosen == "verifier" else None)
        or (code_reward(chosen, opened) if opened is not None else built_in(chosen))
    )
    identity["reward"] = "own" if own else chosen
    notes = [_note(split, train_size, eval_size), None if opened is None else opened.warning]
    return Task(
        name=name,
        fingerprint=_fingerprint(identity),
        train=[_prompted(row, system_prompt, prompt_format) for row in split.train],
        held_out=[_prompted(row, system_prompt, prompt_format) for row in split.held_out],
        reward=function,
        score=own or solved(function),
        own_reward=own is not None,
        note=" ".join(filter(None, notes)) or None,
    )


def _check_reward_name(reward: str | None) -> None:
    if reward is not None and reward not in BUILT_IN and not is_own(reward):
        raise InputError(
            f"there is no reward `{reward}`; the rewards are {', '.join(BUILT_IN)}, or path/to/file.py:function."
        )


def _bare(split: Split) -> Split:
    # Metadata holds values that no table column can; the verifier keeps its own.
    def bare(item: Row) -> Row:
        answer = "" if item["answer"] is None else str(item["answer"])
        prompt = [{"role": "user", "content": item["question"]}]
        return {"prompt": prompt, "question": item["question"], "answer": answer}

    return Split(
        [bare(item) for item in split.train], [bare(item) for item in split.held_out], split.distinct
    )


def _prompted(row: Row, system_prompt: str | None, prompt_format: str) -> Row:
    messages = row["prompt"]
    if system_prompt is not None:
        rest = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system_prompt}, *rest]
    if prompt_format == "plain":
        return {**row, "prompt": "\n".join(message["content"] for message in messages)}
    return {**row, "prompt": messages}


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
    return (
        f"the task `{name}` is {kind}; give `{gym.PREFIX}NAME`, `{programs.NAME}`, or the path of a jsonl or csv "
        "file."
    )
