"""The built-in rewards, with TRL's signature: one score per completion."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from midtune.tasks.answers import (
    extract,
    last_boxed,
    marked_answer,
    normalise,
    parse_number,
    reference_answer,
    same_number,
)

Reward = Callable[..., list[float]]

BUILT_IN = ("exact", "numeric", "math", "verifier", "code", "code-all")
SOLVED = 1 - 1e-6
_MATH_TIMEOUT_S = 3
_HUGE = re.compile(
    r"(?:\^|\*\*)[\s({]*-?[0-9.]+[\s)}]*(?:\^|\*\*)"  # a tower of powers
    r"|(?:\^|\*\*)[\s({]*-?[0-9]{5,}"
    r"|[0-9]{5,}\s*!|[0-9)][\s)}]*![\s)}]*!"
)


def completion_text(completion: Any) -> str:
    """The text of a completion as TRL passes it: a string, or a list of chat messages."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def completion_of(prompt: Any, text: str) -> Any:
    """A completion in the form TRL gives it: a text for a text prompt, messages for chat messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def per_completion(name: str, score_one: Callable[[str, str, str], float]) -> Reward:
    """A reward called `name` from a function of (extracted answer, reference answer, question).

    Whatever `score_one` raises, and any score that is not a finite number, counts as 0.
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
    ) -> list[float]:
        questions = columns.get("question") or [""] * len(completions)
        scores = []
        for completion, reference, question in zip(completions, answer, questions, strict=True):
            reference = reference if name == "verifier" else reference_answer(reference)
            found = (
                completion_text(completion)
                if name == "math"
                else extract(completion_text(completion), reference)
            )
            scores.append(_guarded(score_one, found, reference, question))
        return scores

    return named(reward, name)


def is_huge(text: str) -> bool:
    """Whether evaluating a text may not end: a tower of powers, or a power or factorial of many digits."""
    return _HUGE.search(text) is not None


def solved(reward: Reward) -> Reward:
    """The same reward as 1 where it is full and 0 elsewhere."""

    def score(**columns: Any) -> list[float]:
        return [1.0 if value >= SOLVED else 0.0 for value in reward(**columns)]

    return named(score, "solved")


def built_in(name: str) -> Reward:
    """`exact`, `numeric` or `math`."""
    return per_completion(name, {"exact": _exact, "numeric": _numeric, "math": _math}[name])


def default_reward(answers: Sequence[str]) -> str:
    """`numeric` if every answer is a number, else `exact`."""
    return (
        "numeric"
        if all(parse_number(reference_answer(answer)) is not None for answer in answers)
        else "exact"
    )


def named(reward: Reward, name: str) -> Reward:
    """The reward with `__name__` set, which TRL logs it under."""
    reward.__name__ = reward.__qualname__ = name
    return reward


def _guarded(score_one: Callable[[str, str, str], float], found: str, reference: str, question: str) -> float:
    try:
        value = float(score_one(found, reference, question))
    except Exception:  # noqa: BLE001 (a verifier that cannot read an answer rejects it)
        return 0.0
    return value if math.isfinite(value) else 0.0


def _exact(found: str, reference: str, question: str) -> float:
    return float(bool(normalise(reference)) and normalise(found) == normalise(reference))


def _numeric(found: str, reference: str, question: str) -> float:
    return float(same_number(found, reference))


def _math(text: str, reference: str, question: str) -> float:
    marked = marked_answer(text)
    candidates = [text] if marked is None else [f"${marked.strip('$')}$", marked]
    gold = _parsed_reference(reference)
    return float(any(not is_huge(text) and _verify(gold, _parse(text)) for text in candidates))


@lru_cache(maxsize=4096)
def _parsed_reference(reference: str) -> tuple[Any, ...]:
    inner = last_boxed(reference) or reference
    return tuple(_parse(f"${inner.strip('$')}$") or _parse(reference))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=_timeout()))


def _verify(gold: Sequence[Any], found: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(list(gold), found, timeout_seconds=_timeout()))


def _timeout() -> int | None:
    # math-verify's timeouts are signals, which only the main thread of a POSIX process can take.
    alone = threading.current_thread() is threading.main_thread() and os.name == "posix"
    return _MATH_TIMEOUT_S if alone else None
