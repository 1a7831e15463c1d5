"""Majority vote among the answers to one problem: a pure function on text."""

from __future__ import annotations

from collections.abc import Sequence

from midtune.tasks.notation import normalise, same_number


def majority(answers: Sequence[str]) -> int | None:
    """The index of the first answer (`answers.extract`) that agrees with the most others; None if there are none.

    Answers agree as the same number, or the same text up to case and whitespace. Blank ones vote only if all are blank.
    """
    groups: list[list[int]] = []
    for index, answer in enumerate(answers):
        group = next((group for group in groups if _agree(answers[group[0]], answer)), [])
        if not group:
            groups.append(group)
        group.append(index)
    voting = [group for group in groups if answers[group[0]].strip()] or groups
    # Of equally long groups, max takes the first.
    return max(voting, key=len)[0] if voting else None


def _agree(left: str, right: str) -> bool:
    return normalise(left) == normalise(right) or same_number(left, right)
