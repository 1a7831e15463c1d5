"""The built-in rewards, with TRL's signature: one score per completion."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from midtune.config import JUDGES, SHAPING
from midtune.errors import InputError, MidtuneError
from midtune.tasks.answers import (
    after_thinking,
    extract,
    final_answer,
    given_answer,
    reference_answer,
    same_answer,
)
from midtune.tasks.mathematics import Comparer
from midtune.tasks.notation import (
    is_text,
    is_two_numbers,
    normalise,
    parse_number,
    read_number,
    same_number,
    undressed,
    units_differ,
    without_lead,
)

Reward = Callable[..., list[float]]

BUILT_IN = (*JUDGES, *SHAPING)
SOLVED = 1 - 1e-6
_COMPARER = Comparer()
# The most characters of an answer that math-verify reads, and of a text's end that it searches.
_LONGEST = 1000
_SEARCHED = 4000
_HUGE = re.compile(
    r"(?:\^|\*\*)[\s({]*-?[0-9.]+[\s)}]*(?:\^|\*\*)"  # a tower of powers
    r"|(?:\^|\*\*)[\s({]*-?[0-9]{5,}"
    r"|[0-9]{5,}\s*!|[0-9)][\s)}]*![\s)}]*!"
)


def completion_text(completion: Any) -> str:
    """The text of a completion in TRL's form: a string, or a list of chat messages."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def completion_of(prompt: Any, text: str) -> Any:
    """A completion in TRL's form: a text for a text prompt, messages for chat messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def per_completion(name: str, score_one: Callable[[str, str, str], float]) -> Reward:
    """Make a reward from a function of (answer, reference answer, question); errors and non-finite scores count as 0.

    `math` gets the completion after its reasoning; a `verifier`, which may not read LaTeX, `answers.extract`; others
    `answers.final_answer`. midtune's own errors are raised.
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
    ) -> list[float]:
        questions = columns.get("question") or [""] * len(completions)
        scores = []
        for completion, reference, question in zip(completions, answer, questions, strict=True):
            reference = reference if name == "verifier" else reference_answer(reference)
            text = after_thinking(completion_text(completion))
            if name != "math":
                text = (extract if name == "verifier" else final_answer)(text, reference)
            try:
                score = score_one(text, reference, question)
            except MidtuneError:
                raise
            except Exception:  # noqa: BLE001 (a verifier that cannot read an answer rejects it)
                score = 0.0
            scores.append(float(score) if is_number(score) else 0.0)
        return scores

    return named(reward, name)


def is_number(value: Any) -> bool:
    """Whether a value, also numpy's or torch's, is one finite number, not a text."""
    try:
        return hasattr(value, "__float__") and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def is_huge(text: str) -> bool:
    """Whether evaluating a text may never end: a tower of powers, or a power or factorial of many digits."""
    return _HUGE.search(text) is not None


def solved(reward: Reward) -> Reward:
    """Turn a reward into 1 where it is full and 0 elsewhere."""

    def score(**columns: Any) -> list[float]:
        return [1.0 if value >= SOLVED else 0.0 for value in reward(**columns)]

    return named(score, "solved")


def built_in(name: str) -> Reward:
    """A reward that compares answers: `exact`, `numeric` or `math`."""
    return per_completion(name, _COMPARISONS[name])


def default_reward(answers: Sequence[str]) -> str:
    """`numeric` if every answer is a number, `math` if some are LaTeX, else `exact`."""
    if all(parse_number(reference_answer(answer)) is not None for answer in answers):
        return "numeric"
    return "math" if any("\\" in answer for answer in answers) else "exact"


class Weighted:
    """The weighted sum of several rewards with different names; None counts as 0, as in TRL."""

    def __init__(self, parts: Iterable[Reward], weights: Iterable[float]) -> None:
        self.parts, self.weights = list(parts), list(weights)
        names = [part.__name__ for part in self.parts]
        if len({*names}) < len(names):
            raise InputError(
                f"the rewards {', '.join(names)} have one name twice; give each function a name of its own."
            )
        self.__name__ = "+".join(names)

    def __call__(self, **columns: Any) -> list[float]:
        found = [part(**columns) for part in self.parts]
        return [
            sum(weight * (value or 0.0) for weight, value in zip(self.weights, values, strict=True))
            for values in zip(*found, strict=True)
        ]


def parts_of(reward: Reward) -> tuple[list[Reward], list[float]]:
    """A reward's parts and their weights."""
    return (reward.parts, reward.weights) if isinstance(reward, Weighted) else ([reward], [1.0])


def with_weight(text: str) -> tuple[str, float]:
    """Parse a weight: `format=0.2` → `("format", 0.2)`; default 1."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, float(weight)) if name and math.isfinite(float(weight)) else (text, 1.0)
    except ValueError:
        return text, 1.0


def named(reward: Reward, name: str) -> Reward:
    """Set `__name__`, under which TRL logs the reward."""
    reward.__name__ = reward.__qualname__ = name
    return reward


def _same_text(found: str, reference: str) -> bool:
    if normalise(found) == normalise(reference):
        return True
    if parse_number(reference) is None or is_two_numbers(reference):
        return False
    given, wanted = read_number(found, lead=True), read_number(reference)
    return given is not None and wanted is not None and given.text == wanted.text


def _math(text: str, reference: str) -> bool:
    found = final_answer(text, reference)
    if same_answer(found, reference, _same_in_math):
        return True
    # In LaTeX an expression may end the text even if no number does.
    is_found = bool(found) or "$" not in text and "\\" not in text
    is_settled = given_answer(text) is not None or (read_number(reference) is not None and is_found)
    if is_settled or is_text(reference):
        return False
    if same_answer(without_lead(found), reference, _same_in_math):
        return True
    # math-verify looks for an answer that has no mark; a cut within a line could part two dollar signs.
    end = text if len(text) <= _SEARCHED else text[-_SEARCHED:].partition("\n")[2]
    return not is_huge(end) and _COMPARER.equal(_in_latex(reference), [end])


def _same_in_math(found: str, reference: str) -> bool:
    if normalise(found) == normalise(reference):
        return True
    if read_number(found, lead=True) is not None and read_number(reference) is not None:
        return same_number(found, reference)
    if len(found) > _LONGEST:
        return False
    # math-verify would misread these as sums, products or fractions.
    if is_text(found) or is_text(reference) or units_differ(found, reference) or is_huge(found):
        return False
    return _COMPARER.equal(_in_latex(reference), _in_latex(found))


def _in_latex(answer: str) -> list[str]:
    """Notations that math-verify may be able to read."""
    answer = " ".join(answer.split()).rstrip(".,;: ")
    answer = answer if answer.isascii() else undressed(answer)
    return [f"${answer.strip('$')}$", answer, undressed(answer)]


_COMPARISONS: dict[str, Callable[[str, str, str], float]] = {
    "exact": lambda found, reference, _: same_answer(found, reference, _same_text),
    "numeric": lambda found, reference, _: same_number(found, reference),
    "math": lambda text, reference, _: _math(text, reference),
}
