"""Find the final answer of a completion and compare it: pure functions on text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from midtune.tasks.notation import (
    last_number,
    normalise,
    read_number,
    same_number,
    undressed,
    without_emphasis,
)

_BRACE = re.compile(r"\\f?box(?:ed)?\s*\{|\\?[{}]")
_JOINED = re.compile(
    r"[\s$]*(?:[,;]|[,;]?[\s$]*(?:\\text\s*\{\s*)?\b(?:and|or)\b\s*\}?)[\s$]*(?:[a-zA-Z]\s*=\s*)?[\s$]*"
)
# A minus before a box belongs to the answer; at the start of a line, with a space behind it, it makes a list.
_NEGATED = re.compile(r"(?:[=(${~]|\\approx|\\[(\[])\s*[-\u2212]\s*$|(?<!\S)[-\u2212]$")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"(?<!#)####(?!#)")
_STATED = re.compile(
    r"\b(?:answer|option|choice)s?\b(?:\s+(?:to|for|of|in)\b[^\n.:=]{0,60}?)?"
    r"\s*(?:\b(?:is|are|was|(?:would|should|must) be|equals)\b\s*:?|:|=)\s*"
    r"(?:(?P<math>\${1,2}(?:\\.|[^$\\])+?\${1,2})(?P<tail>[^\n]*)|(?P<line>[^\n]+))",
    re.IGNORECASE | re.DOTALL,
)
_EMPHASISED_END = re.compile(r"(?<![\w*)])\*\*(?=[^\s*])([^*\n]+)\*\*[.!]?\s*$")
_REASON = r"(?:because|since|as|which|where|so|by)\b"
_ENDED = re.compile(rf"\s*(?:$|[.,;:!(]|{_REASON})")
_SENTENCE_END = re.compile(rf"\.\s+(?=\S+\s+\S)|,?\s+{_REASON}")
_CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?[(\[]?\s*([A-J])\s*(?:[)\].:]+\s*|$)(.*)", re.DOTALL)
_NEXT_CHOICE = re.compile(r"(?<!\w)[A-Z][).:]")


def final_answer(text: str, reference: str = "") -> str:
    """The final answer in a completion, as written there; text before `</think>` is ignored.

    In order: the last `<answer>…</answer>`, the last `\\boxed{…}`, what follows a `####` that ends the text, what
    follows the last `answer is`; then the last number if `reference` is one, else the last non-empty line (or as many
    as `reference` has). Only this form of the reference is used.
    """
    text = after_thinking(text)
    marked = marked_answer(text)
    if marked is not None:
        return marked
    number = read_number(reference)
    lines = len(reference.strip("\n").splitlines()) or 1
    stated, rest = _stated(text) or ("", text)
    if stated and (read_number(stated, lead=True) if number else stated.count("\n") >= lines - 1):
        return stated
    end = "\n".join(text.rstrip().splitlines()[-lines:])
    end = end if lines > 1 else end.strip()
    if number is None or (number.unit and read_number(end, lead=True)):
        return end
    # `The answer is not obvious` states no number.
    return last_number(rest) or stated


def given_answer(text: str) -> str | None:
    """The answer that a completion marks or states (`the answer is …`), or None."""
    marked = marked_answer(text)
    return marked if marked is not None else (_stated(text) or (None,))[0]


def extract(text: str, reference: str = "") -> str:
    """`final_answer`; if `reference` is a number, the answer's number in plain digits."""
    found = final_answer(text, reference)
    wanted, given = read_number(reference), read_number(found, lead=True)
    return found if wanted is None or wanted.unit or given is None else given.text


def after_thinking(text: str) -> str:
    """The text after the last `</think>`, or all of it; `<think>` itself is often in the prompt."""
    return text.rpartition("</think>")[2]


def marked_answer(text: str) -> str | None:
    """The answer that a text marks with `<answer>`, `\\boxed` or a `####` at its end, or None."""
    tags = _TAG.findall(text)
    if tags:
        inside = str(tags[-1]).strip()
        boxed = last_boxed(inside)
        return boxed.strip() if boxed is not None else (_stated(inside) or (inside,))[0]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    marks = list(_HASHES.finditer(text))
    # Elsewhere it is a heading.
    after = text[marks[-1].end() :].strip() if marks else "\n"
    return None if "\n" in after else after


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{…}`, nested braces and a minus before it included, or None.

    Boxes joined by a comma, `and` or `or` are one answer: `\\boxed{2}$ or $x = \\boxed{3}` gives `2, 3`.
    """
    open_braces: list[re.Match[str]] = []
    boxes: list[tuple[int, str, int]] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "}" and open_braces:
            opening = open_braces.pop()
            if len(opening[0]) > 1:
                boxes.append((opening.start(), text[opening.end() : brace.start()].strip(), brace.end()))
        elif brace[0] not in ("}", r"\{", r"\}"):
            open_braces.append(brace)
    boxes.sort()
    found: list[str] = []
    start = len(text)
    while boxes and (not found or _JOINED.fullmatch(text, boxes[-1][2], start)):
        start, content, _ = boxes.pop()
        if content and _NEGATED.search(text[max(0, start - 20) : start]):
            content = f"-{content}"
        found[:0] = [] if content in found else [content]
    return ", ".join(found) if found else None


def reference_answer(answer: str) -> str:
    """The final answer in a dataset's answer column: what it marks (`… #### 42`), else all of it."""
    marked = marked_answer(answer)
    if marked is None:
        return answer.strip("\n")
    # GSM8K marks one number, so that its commas are those of thousands.
    if "####" in answer and re.fullmatch(r"-?[0-9,.]+", marked) and read_number(marked) is not None:
        return marked.replace(",", "")
    return marked


def same_answer(found: str, reference: str, same: Callable[[str, str], bool]) -> bool:
    """Whether two answers agree, where each may be a choice, its letter or both.

    `(B) 42` and `B` compare letters, `(B) 42` and `42` the rest, `(B) 42` and `(C) 42` both. `same` compares the rest,
    a completion's answer first.
    """
    if normalise(found) == normalise(reference):
        return bool(normalise(reference))
    said, said_rest = _choice(found)
    letter, rest = _choice(reference)
    if said and letter:
        return said == letter and (not said_rest or not rest or same(said_rest, rest))
    if letter:
        return bool(rest) and same(found, rest)
    return same(said_rest if said_rest else found, reference)


def majority(answers: Sequence[str]) -> int | None:
    """The index of the first answer (`extract`) that agrees with the most others; None if there are none.

    Answers agree as the same number, or the same text up to case and whitespace. Blank ones vote only if all are blank.
    """
    groups: dict[str, list[int]] = {}  # by the first answer of each
    for index, answer in enumerate(answers):
        same = (key for key in groups if normalise(key) == normalise(answer) or same_number(key, answer))
        groups.setdefault(next(same, answer), []).append(index)
    voting = [group for key, group in groups.items() if key.strip()] or [*groups.values()]
    # Of equally long groups, max takes the first.
    return max(voting, key=len)[0] if voting else None


def _choice(text: str) -> tuple[str, str]:
    found = _CHOICE.fullmatch(undressed(text).strip())
    # `A. 5, B. 6` answers two questions, and `D. H. Lawrence` is a name.
    if found is None or _NEXT_CHOICE.search(found[2]):
        return "", ""
    return found[1], found[2].strip()


def _stated(text: str) -> tuple[str, str] | None:
    """What the last `answer is`, or bold type at the end, states, and the text after that line."""
    plain = without_emphasis(text)
    stated = list(_STATED.finditer(plain))
    if not stated:
        emphasised = _EMPHASISED_END.search(text)
        return (emphasised[1].strip(), "") if emphasised is not None else None
    found = stated[-1]
    if found["math"] is not None and _ENDED.match(found["tail"]):
        return found["math"].strip("$").strip(), plain[found.end() :]
    line = found["line"] or found["math"] + found["tail"]
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip().rstrip(".,;:").strip(), plain[found.end() :]
