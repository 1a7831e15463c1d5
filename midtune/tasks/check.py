"""Try a task's rewards on real rows before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from midtune.errors import WHY, InputError, bounded, explained
from midtune.tasks.answers import reference_answer
from midtune.tasks.environment import check_game
from midtune.tasks.notation import parse_number
from midtune.tasks.rewards import BUILT_IN, Reward, completion_of, is_number, parts_of
from midtune.tasks.sources.own import is_task_file
from midtune.tasks.split import Row
from midtune.tasks.task import Task

_ROWS = 4
_ROWS_IN_DOUBT = 32
_SHOWN = 200
_WRONG = "I do not know."
# Marks that a person's own reward may look for.
_TAGGED = "<answer>{}</answer>"
_FORMS = ("{}", "\\boxed{{{}}}", _TAGGED, f"<think>\n…\n</think>\n{_TAGGED}", "#### {}")


@dataclass(frozen=True)
class Scored:
    """A completion that was tried, and its score."""

    completion: str
    score: float


def check_reward(task: Task) -> None:
    """Call the task's rewards and score on its first rows with right, wrong and empty completions.

    Raises InputError if one raises, returns no number, or scores known answers no higher; or as `check_game`.
    """
    rows = task.train[:_ROWS]
    if task.game is not None:
        # Nothing can be judged before it is played.
        check_game(task.game, rows)
        return
    right = [row["answer"] for row in rows]
    for reward in dict.fromkeys([*parts_of(task.reward)[0], task.score]):
        for texts in (right, [_WRONG] * len(rows), [""] * len(rows)):
            _call(reward, rows, texts, task)
    if not any(right) or (task.own_reward and not is_task_file(task.name)):
        return
    # Some reasoning-gym datasets give no answer to compare with, only a verifier.
    samples = (scored_samples(task, row) for row in rows if row["answer"])
    if any(known.score > wrong.score for known, wrong in samples):
        return
    hint = "choose another reward with --reward"
    if task.own_reward:
        hint = (
            "fix it (it gets values as the rows have them, numbers as numbers), or give `answer` another name if it "
            "is no answer"
        )
    raise InputError(
        f"the reward `{task.reward.__name__}` gives right answers of "
        f"`{task.name}` no more than wrong ones, as on {_shown(rows[0])}; {hint}."
    )


def doubts(task: Task) -> list[str]:
    """Report a person's own rewards that never score above 0 on completions of many kinds.

    Raises InputError if one gives None for all of them.
    """
    rows = task.train[:: max(1, len(task.train) // _ROWS_IN_DOUBT)][:_ROWS_IN_DOUBT]
    kinds = [[_WRONG] * len(rows), [""] * len(rows)]
    if any(row["answer"] for row in rows):
        answers = [reference_answer(row["answer"]) for row in rows]
        kinds += [[row["answer"] for row in rows], [wrong_answer(answer) for answer in answers]]
        kinds += [[form.format(answer) for answer in answers] for form in _FORMS]
    found = []
    for reward in parts_of(task.reward)[0]:
        if reward.__name__ in BUILT_IN:
            continue  # `check_reward` compares these, and `length` and `repetition` only punish
        given = [value for texts in kinds for value in _call(reward, rows, texts, task)]
        known = [value for value in given if value is not None]
        tried = f"{len(given)} completions of {len(rows)} problems, right and wrong ones"
        if not known:
            raise InputError(
                f"the reward `{reward.__name__}` of `{task.name}` gives None for all of {tried}, so there is nothing "
                "to learn from; let it return numbers."
            )
        if max(known) <= 0:
            scored = "0" if min(known) == max(known) == 0 else f"{min(known):g} to {max(known):g}"
            found.append(
                f"the reward `{reward.__name__}` never gave more than 0 for {tried} (it gave {scored}): see that it "
                "finds the answer, and in which form it wants it"
            )
    return found


def scored_samples(task: Task, row: Row) -> tuple[Scored, Scored]:
    """A right completion, in the first usual form that scores most, and a wrong one, each with its score."""
    answer = reference_answer(row["answer"])
    texts = [row["answer"], *(form.format(answer) for form in _FORMS), wrong_answer(answer)]
    *right, wrong = [Scored(text, _call(task.score, [row], [text], task)[0] or 0.0) for text in texts]
    return max(right, key=lambda sample: sample.score), wrong


def wrong_answer(answer: str) -> str:
    """The answer plus 1 if it is a number, else a text that answers nothing."""
    value = parse_number(answer)
    return _WRONG if value is None else f"{value + 1:.15g}"


def _call(reward: Reward, rows: Sequence[Row], texts: Sequence[str], task: Task) -> list[float | None]:
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    asked = f"the reward `{reward.__name__}` of `{task.name}`"
    tried = f"on {_shown(rows[0])} with the completion {texts[0][:_SHOWN]!r}"
    with explained(f"{asked} raised {WHY}, {tried}; fix it.", with_kind=True):
        values: Any = reward(
            prompts=[row["prompt"] for row in rows],
            completions=[completion_of(row["prompt"], text) for row, text in zip(rows, texts, strict=True)],
            completion_ids=[[0] * bool(text) for text in texts],
            **columns,
        )
    try:
        values = list(values)
    except TypeError:
        raise InputError(
            f"{asked} returned {str(values)[:_SHOWN]!r}, but it must return a list with one number per completion."
        ) from None
    if len(values) != len(rows):
        raise InputError(
            f"{asked} returned {len(values)} values for {len(rows)} completions, first {_shown(rows[0])}; "
            "it must return one number per completion."
        )
    for value, row, text in zip(values, rows, texts, strict=True):
        if value is not None and not is_number(value):
            raise InputError(
                f"{asked} returned {str(value)[:_SHOWN]!r} for the completion {text[:_SHOWN]!r} on {_shown(row)}; "
                "it must return finite numbers (or None where it does not apply)."
            )
    return [None if value is None else float(value) for value in values]


def _shown(row: Row) -> str:
    return f"row {bounded(str({key: value for key, value in row.items() if key != 'prompt'}), _SHOWN)}"
