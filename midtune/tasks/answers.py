"""Reading the final answer out of a completion: pure functions on text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

# Characters that NFKC leaves, or turns into something else than what they mean in an answer.
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2009\u202f", "\\,"),
        **{
            char: " " + unicodedata.normalize("NFKC", char).replace("\u2044", "/")
            for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
        },
        "²": "^2",
        "³": "^3",
        "×": "\\times ",
        "·": "\\cdot ",
        "π": "\\pi ",
        "√": "\\sqrt ",
        "∞": "\\infty ",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≈": "\\approx ",
        "∈": "\\in ",
        "∪": "\\cup ",
    }
)
_EMPHASIS = re.compile(r"(?<![\w*)\]}])(\*{1,3}|_{1,3}|`)(?=\S)(.{1,300}?)(?<=\S)\1(?![\w*(])")
# What separates thousands in LaTeX and nothing else: `1{,}234`, `1,\!234`, `1\,234`.
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\s?\{\s?,\s?\}|,?\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))")
_DEGREE = re.compile(r"\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\degrees?(?![a-z])|\\textdegree)")
_SPACING = re.compile(
    r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|bf|rm|it)(?![a-zA-Z])"
)
_NOTHING = re.compile(r"(?<!\\)\\[!()\[\]$]|\$")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|tt|sf)?|math(?:rm|bf|it|sf)|[mh]box|operatorname\*?|emph|boldsymbol|bm)"
    r"\s*\{([^{}]*)\}"
)

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = (
    rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9])"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*[-+]?[0-9]{1,4}\s*\}|\(?[-+]?[0-9]{1,4}\)?))?"
)
_UNSIGNED = (
    # A whole number before a proper fraction makes it a mixed number.
    r"(?:(?P<whole>[0-9]+)(?:\s*(?:and\s*)?(?=\\frac)|\s+(?:and\s+)?(?=[0-9]+\s?/)))?"
    rf"(?:\\frac\{{\s*(?P<top>[-+]?\s?{_DECIMAL})\s*\}}\{{\s*(?P<bottom>[-+]?\s?{_DECIMAL})\s*\}}"
    rf"|(?P<number>{_DECIMAL})(?:\s?/\s?(?P<denominator>[0-9]+(?:\.[0-9]+)?)(?![\d/])"
    r"|(?P<point>\.?)\\overline\{(?P<repeated>[0-9]+)\})?)"
    r"(?:\s*(?P<percent>%|percent\b))?"
)
_CURRENCY = r"(?:[£€¥]\s?(?P<minus>-)?)?"
_NUMBER = re.compile(rf"(?P<sign>[-+]\s*)?{_CURRENCY}{_UNSIGNED}")
# A minus after a digit, letter or closing bracket is a subtraction, and one before a space may start a list.
_IN_TEXT = re.compile(rf"(?P<sign>(?<![\w)\]}}%])[-+]|(?<==)\s*[-+]\s*)?{_CURRENCY}(?<![0-9.]){_UNSIGNED}")
_POWER = re.compile(r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)")
# Neighbours that make a number part of an expression, in which it is no answer.
_BEFORE = re.compile(r"[\^_*/+{]\s?$|\\[a-zA-Z]+\s?$")
_AFTER = re.compile(r"\s?[\^*+_\\!]|[a-zA-Z](?![a-zA-Z])")
# What may stand before the number in a marked answer: a choice letter, `x =`, `The answer is`.
_LEAD = re.compile(
    r"\(?[A-J][).:]+\s*"
    r"|(?:(?!\b(?:or|and|not)\b|[;\n]|,(?![0-9]{3})).)*"
    r"(?:(?<![<>!\\])=|\\approx|(?<=[A-Za-z]):"
    r"|\b(?:is|are|was|be|equals?|about|approximately|roughly|exactly|has|have|had|gets?)\b)\s*"
)
_UNIT_WORD = r"[^\W\d_]+\.?(?:\s*\^\s*\{?-?[1-9]\}?)?"
_UNIT = re.compile(rf"°\s?[CF]?|(?=(?P<word>[^\W\d_]+)){_UNIT_WORD}(?:\s*[/ ]\s*{_UNIT_WORD})*")
# Short words that may stand directly after a number without being a product of variables.
_ATTACHED = re.compile(
    r"(?:[cdkm]?m|[km]?g|m?[lL]|lbs?|oz|ft|in|yd|mi|mph|kph|hrs?|h|mins?|secs?|s|am|pm|th|st|nd|rd)\b"
)
_SINGLE = "mgshlLNJWVK"
# Words that change a number, or begin another answer.
_NO_UNITS = re.compile(
    r"\b(?:hundred|thousand|[mbtr]+illion|dozen|score|pi|sqrt|mod|or|and|to|plus|minus|times|over|more|less|fewer|than"
    r"|not|if|but|factorial|squared|cubed|sin|cos|tan|log|ln)s?\b",
    re.IGNORECASE,
)
_TWO_NUMBERS = re.compile(r"[-+]?[1-9][0-9]{2},[1-9][0-9]{2}")

_CODE = re.compile(
    r"(?<![\w.])[0-9]+([-/.])[0-9]+\1[0-9]+(?![\w.])|(?<![\w:])[0-9]{1,2}\s*:\s*[0-5][0-9](?![\w:])"
    r"|\b0[box][0-9a-f]+\b|:[^:]*:|(?<![_^\w.])[0-9]+(?:\.[0-9]+)?\s+[0-9]"
)
_TRAILING_UNIT = re.compile(
    r"(?<=[0-9a-z})\]])\s*((?:\^\{?\s*\\circ\s*\}?)?)\s*\\(?:text|mathrm|mbox)[a-z]*\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?\s*$"
)
_CONNECTIVE = re.compile(r"\b(?:and|or|if|for|where|with)\b")
_WORD = re.compile(r"[^\W\d_]+")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt abs pi inf infinity oo".split()
)

_INSIDE = re.compile(r"\(([^()\[\],]*)\)|\{([^{},:]*)\}|'([^']*)'|\"([^\"]*)\"")

# Fonts within fonts; characters of an answer that is a number; characters searched for the last number.
_DEEPEST = 3
_LONGEST = 300
_END = 4000

_BRACE = re.compile(r"\\f?box(?:ed)?\s*\{|\\?[{}]")
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
_CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?\(?\s*([A-J])\s*(?:[).:]+\s*|$)(.*)", re.DOTALL)
_NEXT_CHOICE = re.compile(r"(?<!\w)[A-J][).:]")


def final_answer(text: str, reference: str = "") -> str:
    """The final answer in a completion, as it is written there.

    In order: the last `<answer>…</answer>`, the last `\\boxed{…}`, what follows a `####` that ends the text, what
    follows the last `answer is`; then, if `reference` is a number, the last number in the text, else the last
    non-empty line (as many lines as `reference` has). Reasoning that has ended is not read.

    Args:
        text: a completion.
        reference: the right answer; only its form (number, number of lines) is used.
    """
    text = after_thinking(text)
    numeric = read_number(reference) is not None
    marked = marked_answer(text)
    if marked is not None:
        return marked
    stated = _stated(text)
    if stated is not None and (not numeric or read_number(stated[0], lead=True) is not None):
        return stated[0]
    if numeric:
        # `The answer is not obvious` states none.
        return last_number(text[stated[1] :] if stated else text) or (stated[0] if stated else "")
    lines = reference.strip("\n").splitlines()
    if len(lines) > 1:
        return "\n".join(text.strip("\n").rstrip().splitlines()[-len(lines) :])
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def given_answer(text: str) -> str | None:
    """The answer that a completion marks, or states as `the answer is …`, or None."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    stated = _stated(text)
    return stated[0] if stated is not None else None


def extract(text: str, reference: str = "") -> str:
    """The final answer in a completion; where `reference` is a number, the answer's number in plain digits.

    Args:
        text: a completion.
        reference: the right answer; only its form (number, number of lines) is used.
    """
    found = final_answer(text, reference)
    number = read_number(reference)
    if number is None or number.unit:
        return found
    return written_number(found) or found


def after_thinking(text: str) -> str:
    """What follows the last `</think>`, or all where there is none.

    Reasoning may name other answers; its `<think>` is often the prompt's and not in a completion.
    """
    return text.rpartition("</think>")[2]


def marked_answer(text: str) -> str | None:
    """The answer that a text marks with `<answer>`, `\\boxed` or a `####` at its end, or None."""
    tags = _TAG.findall(text)
    if tags:
        inside = str(tags[-1]).strip()
        boxed = last_boxed(inside)
        stated = _stated(inside)
        return boxed.strip() if boxed is not None else stated[0] if stated is not None else inside
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    marks = list(_HASHES.finditer(text))
    # Elsewhere it is a heading.
    after = text[marks[-1].end() :].strip() if marks else "\n"
    return None if "\n" in after else after


def last_boxed(text: str) -> str | None:
    """What stands in the last complete `\\boxed{…}`, nested braces included, or None."""
    open_braces: list[int | None] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] in (r"\{", r"\}"):
            continue
        if brace[0] != "}":
            open_braces.append(brace.end() if len(brace[0]) > 1 else None)
        elif open_braces and (start := open_braces.pop()) is not None and (last is None or start > last[0]):
            last = start, brace.start()
    return text[last[0] : last[1]] if last else None


def reference_answer(answer: str) -> str:
    """The final answer in a data set's answer column: what it marks (`… #### 42`), else all of it."""
    marked = marked_answer(answer)
    if marked is None:
        return answer.strip("\n")
    # GSM8K marks one number, so that its commas are those of thousands.
    is_number = "####" in answer and re.fullmatch(rf"-?{_DIGITS}(?:\.[0-9]+)?", marked) is not None
    return marked.replace(",", "") if is_number else marked


@dataclass(frozen=True)
class Number:
    """A number as it was written.

    Args:
        value: exactly, without the percent sign.
        decimals: digits after the point, where that many may be a rounding; else None.
        percent: whether a percent sign follows.
        unit: what follows, such as `cm^2`.
    """

    value: Fraction
    decimals: int | None = None
    percent: bool = False
    unit: str = ""


def read_number(text: str, *, lead: bool = False) -> Number | None:
    """The number that a text is, with or without a unit (`-5`, `1,234.50`, `$3`, `5\\frac{1}{8}`, `45^\\circ`).

    Args:
        text: an answer.
        lead: whether words, a choice letter or `x =` may stand before it.
    """
    if len(text) > _LONGEST:
        return None
    text = _bare(undressed(text))
    start = _LEAD.match(text) if lead else None
    found = None
    for begin in dict.fromkeys((0, start.end() if start else 0)):
        found = _NUMBER.match(text, begin)
        if found is not None and (unit := _unit(text, found.end())) is not None:
            return _value(found, unit)
    return None


def parse_number(text: str) -> float | None:
    """The value of a text that is nothing but a number (`-5`, `1,234.50`, `$3`, `50%`, `3/4`), or None."""
    number = read_number(text)
    if number is None or number.unit not in ("", "°"):
        return None
    try:
        return float(number.value)
    except OverflowError:
        return None


def same_number(found: str, reference: str) -> bool:
    """Whether two texts are one number.

    They are equal exactly, or one rounds the other to six digits or more. A percent sign or a unit that only one of
    them has is left out. Of `100,400` nobody knows whether it is one number, so it is only equal to itself.

    Args:
        found: a completion's answer; words, a choice letter or `x =` may stand before the number.
        reference: the right answer.
    """
    if is_two_numbers(reference):
        return normalise(found) == normalise(reference)
    left, right = read_number(found, lead=True), read_number(reference)
    if left is None or right is None:
        return False
    units = [number.unit or "%" * number.percent for number in (left, right)]
    if all(units) and not _same_unit(*units):
        return False
    if _close(left, right):
        return True
    hundredth = Fraction(1, 100)
    return left.percent != right.percent and (
        left.value * (hundredth if left.percent else 1) == right.value * (hundredth if right.percent else 1)
    )


def is_two_numbers(text: str) -> bool:
    """Whether a text such as `100,400` may as well be two numbers."""
    return _TWO_NUMBERS.fullmatch(_bare(undressed(text))) is not None


def last_number(text: str) -> str | None:
    """The last number in a text, in plain digits, or None; one that is part of an expression is none.

    `3-5` reads `5`, `= -5` reads `-5`, `3/4` and `\\frac{3}{4}` read `3/4`, `2^5` reads nothing.
    """
    text = undressed(text[-_END:])
    matches = list(_IN_TEXT.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    if _BEFORE.search(text[: last.start()][-12:]) or (
        _AFTER.match(text, last.end()) and not _ATTACHED.match(text, last.end())
    ):
        return None
    return _written(last)


def written_number(text: str) -> str | None:
    """The number in an answer in plain digits (`x = 1{,}234` gives `1234`), or None where it has none."""
    if len(text) > _LONGEST:
        return None
    text = _bare(undressed(text))
    start = _LEAD.match(text)
    for begin in dict.fromkeys((0, start.end() if start else 0)):
        found = _NUMBER.match(text, begin)
        if found is not None and _unit(text, found.end()) is not None and _value(found) is not None:
            return _written(found)
    return None


def normalise(text: str) -> str:
    """The text without case, and without what only dresses it: spaces, emphasis, dollar signs, fonts."""
    text = _bare(undressed(text)).replace('"', "'")
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    return re.sub(r"(?<![^\W_])\s+|\s+(?![^\W_])", "", " ".join(text.split())).casefold()


def is_text(text: str) -> bool:
    """Whether an answer is words, a date, a time or the like, which are no expression to calculate with."""
    if is_two_numbers(text) or _CODE.search(undressed(text)):
        return True
    unit = _TRAILING_UNIT.search(text)
    if unit is not None and _NO_UNITS.search(unit[0]):
        return True
    bare = _TRAILING_UNIT.sub(r"\1", text)
    fonts = [found[1] for found in _FONT.finditer(bare)]
    rest = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", _FONT.sub(" ", bare))
    words = _WORD.findall(_CONNECTIVE.sub(" ", " ".join(fonts)))
    if any(len(word) > 1 for word in words):
        return True
    words = _WORD.findall(_CONNECTIVE.sub(" ", rest))
    names = [word for word in words if word.casefold() not in _FUNCTIONS]
    is_formula = re.search(r"[0-9=+*/^\\]", bare) is not None
    return any(len(word) > (3 if is_formula else 1) for word in names)


def units_differ(left: str, right: str) -> bool:
    """Whether both answers end in a unit in LaTeX, `\\text{ cm}^2`, and the two are different ones."""
    ends = [_TRAILING_UNIT.search(text) for text in (left, right)]
    one, other = (undressed(end[0].strip()) if end is not None else "" for end in ends)
    return bool(one and other) and not _same_unit(one, other)


def same_answer(found: str, reference: str, same: Callable[[str, str], bool]) -> bool:
    """Whether two answers are the same, where each may be a choice, its letter or both.

    Of `(B) 42` and `B` the letters count, of `(B) 42` and `42` the rest, of `(B) 42` and `(C) 42` both.

    Args:
        found: a completion's answer.
        reference: the right answer.
        same: whether a completion's answer and the right one are the same, where they are no choices.
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


def _choice(text: str) -> tuple[str, str]:
    found = _CHOICE.fullmatch(undressed(text).strip())
    # `A. 5, B. 6` answers two questions.
    if found is None or _NEXT_CHOICE.search(found[2]):
        return "", ""
    return found[1], found[2].strip()


def _stated(text: str) -> tuple[str, int] | None:
    """What the last `answer is` states, or bold type at the end, and where that ends."""
    plain = _EMPHASIS.sub(r"\2", text) if "*" in text or "`" in text else text
    stated = list(_STATED.finditer(plain))
    if not stated:
        emphasised = _EMPHASISED_END.search(text)
        return (emphasised[1].strip(), len(text)) if emphasised is not None else None
    found = stated[-1]
    if found["math"] is not None and _ENDED.match(found["tail"]):
        return found["math"].strip("$").strip(), found.end()
    line = found["line"] or found["math"] + found["tail"]
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip().rstrip(".,;:").strip(), found.end()


def undressed(text: str) -> str:
    """The text in plain characters, without the LaTeX and Markdown that only set it."""
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))
    text = _EMPHASIS.sub(r"\2", text)
    if "\\" in text or "{" in text:
        text = _DEGREE.sub("°", _THOUSANDS.sub("", text))
        text = _SPACING.sub(" ", text).replace("{,}", ",").replace("\\%", "%")
        for _ in range(_DEEPEST):
            text = _FONT.sub(r" \1 ", text)
        text = _FRACTION.sub(
            lambda found: f"\\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}", text
        )
    return _NOTHING.sub("", text)


def _bare(text: str) -> str:
    """The text without what may stand around an answer: spaces, quotes, a full stop, brackets around a word."""
    text = text.strip().rstrip(".,;:").strip()
    while (inside := _INSIDE.fullmatch(text)) is not None:
        text = next(part for part in inside.groups() if part is not None).strip().rstrip(".")
    return text[:-1] if re.fullmatch(r"[A-Za-z]\)", text) else text


def _unit(text: str, start: int) -> str | None:
    """The unit after a number, nothing if the text ends there, or None where something else follows."""
    rest = text[start:].strip()
    if not rest:
        return ""
    found = _UNIT.fullmatch(rest)
    if found is None or _NO_UNITS.search(rest):
        return None
    word = found["word"]
    if word is not None and text[start : start + 1].isalpha() and len(word) < 4 and not _ATTACHED.match(rest):
        return None
    if word is not None and len(word) == 1 and word not in _SINGLE:
        return None
    return rest


def _same_unit(left: str, right: str) -> bool:
    one, other = (_plain_unit(unit) for unit in (left, right))
    if one.rstrip("s") == other.rstrip("s"):
        return True
    from sympy.physics import units

    (one, _, power), (other, _, other_power) = one.partition("^"), other.partition("^")
    known = getattr(units, one, None)
    return known is not None and known == getattr(units, other, None) and power == other_power


def _plain_unit(unit: str) -> str:
    unit = re.sub(r"[\s.{}]", "", unit).casefold()
    unit = re.sub(r"^(?:square|sq)(.*)$", r"\1^2", unit)
    unit = re.sub(r"^(?:cubic|cu)(.*)$", r"\1^3", unit)
    return re.sub(r"degrees?", "°", unit)


def _close(left: Number, right: Number) -> bool:
    gap = abs(left.value - right.value)
    if not gap:
        return True
    if left.value.denominator == right.value.denominator == 1:
        return False
    # One part in 10^15 is what floats lose when they are printed.
    if gap * 10**15 <= abs(right.value):
        return True
    return any(number.decimals is not None and gap * 2 * 10**number.decimals <= 1 for number in (left, right))


def _value(found: re.Match[str], unit: str = "") -> Number | None:
    try:
        top = Fraction(_digits(found["top"] or found["number"]))
        value = top / Fraction(_digits(found["bottom"] or found["denominator"] or "1"))
    except (ValueError, ZeroDivisionError):
        return None
    if found["whole"]:
        if not 0 < value < 1:
            return None
        value += int(found["whole"])
    if found["repeated"]:
        fixed = (found["number"] + found["point"]).partition(".")
        if not fixed[1] or found["whole"]:
            return None
        value += Fraction(int(found["repeated"]), (10 ** len(found["repeated"]) - 1) * 10 ** len(fixed[2]))
    negative = ("-" in (found["sign"] or "")) != bool(found["minus"])
    value = -value if negative else value
    decimals = None
    if found["number"] and not (found["denominator"] or found["whole"] or found["repeated"]):
        parts = Decimal(_digits(found["number"])).as_tuple()
        if isinstance(parts.exponent, int) and parts.exponent < 0 and len(parts.digits) >= 6:
            decimals = -parts.exponent
    return Number(value, decimals, found["percent"] is not None, unit)


def _digits(number: str) -> str:
    return re.sub(r"[\s,{}()]", "", _POWER.sub("e", number))


def _written(found: re.Match[str]) -> str:
    if found["repeated"]:
        number = _value(found)
        return str(number.value) if number is not None else ""
    sign = "-" if ("-" in (found["sign"] or "")) != bool(found["minus"]) else ""
    top, bottom = (_digits(found[name] or "").lstrip("+") for name in ("top", "bottom"))
    if top:
        sign = sign if top.startswith("-") == bottom.startswith("-") else "-" if not sign else ""
    else:
        top, bottom = _digits(found["number"]), found["denominator"] or ""
    whole = f"{found['whole']} " if found["whole"] else ""
    return f"{sign}{whole}{top.lstrip('-')}{'/' * bool(bottom)}{bottom.lstrip('-')}"
