"""How answers are written: numbers, units and words, in plain text, LaTeX and Markdown. Pure functions on text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

# Characters that NFKC leaves alone, or maps to something with another meaning.
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
        **{
            pair[0]: f"\\{pair[1:]} "
            for pair in "×times ·cdot πpi √sqrt ∞infty ≤le ≥ge ≈approx ∈in ∪cup".split()
        },
    }
)
_EMPHASIS = re.compile(r"(?<![\w*)\]}])(\*{1,3}|_{1,3}|`)(?=\S)(.{1,300}?)(?<=\S)\1(?![\w*(])")
# LaTeX's thousands separators: `1{,}234`, `1,\!234`, `1\,234`.
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
# Neighbours that make a number part of an expression, so not an answer.
_BEFORE = re.compile(r"[\^_*/+{]\s?$|\\[a-zA-Z]+\s?$|\b(?:minus|negative|not)\s$", re.IGNORECASE)
_AFTER = re.compile(r"\s?(?:[\^*+_!]|\\(?!end\b|\\))|[a-zA-Z](?![a-zA-Z])")
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
# One-letter units that are rarely variables.
_SINGLE = "mgshlLNJWV"
# Words that change a number, or begin another answer.
_NO_UNITS = re.compile(
    r"\b(?:hundred|thousand|[mbtr]+illion|dozen|score|half|halves|third|quarter|tenth|hundredth|thousandth|pi|sqrt|mod|or|and|to|plus|minus|times|over|more|less|fewer|than"
    r"|not|if|but|the|an?|at|on|of|for|with|from|as|so|because|since|which|that|when|factorial|squared|cubed|sin|cos|tan|log|ln)s?\b",
    re.IGNORECASE,
)
# Two groups of three digits may be two numbers, unless they are money.
_MONEY = re.compile(r"\\\$|^\s*-?\$[^$]*$")
_TWO_NUMBERS = re.compile(r"[-+]?[1-9][0-9]{2},[1-9][0-9]{2}")

# Dates, times, ratios of three, binary numbers, rows of numbers.
_NO_EXPRESSION = re.compile(
    r"(?<![\w.])[0-9]+([-/.])[0-9]+\1[0-9]+(?![\w.])|(?<![\w:])[0-9]{1,2}\s*:\s*[0-5][0-9](?![\w:])"
    r"|\b0[box][0-9a-f]+\b|:[^:]*:|(?<![_^\w.])[0-9]+(?:\.[0-9]+)?\s+[0-9]"
)
_TRAILING_UNIT = re.compile(
    r"(?:(?<=[0-9})\]])|(?<=\\pi))\s*((?:\^\{?\s*\\circ\s*\}?)?)\s*\\(?:text|mathrm|mbox)[a-z]*\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?\s*$"
)
_CONNECTIVE = re.compile(r"\b(?:and|or|if|for|where|with)\b")
_WORD = re.compile(r"[^\W\d_]+")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt abs pi inf infinity oo".split()
)

_INSIDE = re.compile(r"\(([^()\[\],]*)\)|\{([^{},:]*)\}|'([^']*)'|\"([^\"]*)\"")

# Nested fonts; characters of a numeric answer; characters at the end searched for the last number.
_DEEPEST = 3
_LATEX = frozenset("\\{~")
_LONGEST = 300
_END = 4000


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction  # exactly, without the percent sign
    text: str  # in plain digits
    decimals: int | None  # digits after the point, if enough for a rounded number
    percent: bool  # whether a percent sign follows
    unit: str  # what follows, such as `cm^2`


def read_number(text: str, *, lead: bool = False) -> Number | None:
    """Read a number, with or without a unit (`-5`, `1,234.50`, `$3`, `45^\\circ`); `lead` allows words before it."""
    if len(text) > _LONGEST:
        return None
    text = _bare(undressed(text))
    start = _LEAD.match(text) if lead else None
    for begin in dict.fromkeys((0, start.end() if start else 0)):
        found = _NUMBER.match(text, begin)
        if found is not None and (unit := _unit(text, found.end())) is not None:
            return _number(found, unit)
    return None


def without_lead(text: str) -> str:
    """Strip what may stand before an answer: a choice letter, `x =`, `so it is`."""
    start = _LEAD.match(text) if len(text) <= _LONGEST else None
    return text[start.end() :] if start is not None else text


def parse_number(text: str) -> float | None:
    """The value of a text that is only a number (`-5`, `1,234.50`, `$3`, `50%`, `3/4`), or None."""
    number = read_number(text)
    if number is None or number.unit not in ("", "°"):
        return None
    try:
        return float(number.value)
    except OverflowError:
        return None


def same_number(found: str, reference: str) -> bool:
    """Whether two texts are the same number; words may stand before `found`.

    They are equal exactly, or one rounds the other to six digits or more. A unit or percent sign that only one has is
    ignored. `100,400` may be two numbers, so it equals only itself.
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
    if left.percent == right.percent:
        return False
    return left.value == right.value * 100 if left.percent else left.value * 100 == right.value


def is_two_numbers(text: str) -> bool:
    """Whether a text such as `100,400` could be two numbers; `$100,400` could not."""
    return not _MONEY.search(text) and _TWO_NUMBERS.fullmatch(_bare(undressed(text))) is not None


def last_number(text: str) -> str | None:
    """The last number in a text, in plain digits; None if there is none or it is part of an expression.

    `3-5` reads `5`, `= -5` reads `-5`, `3/4` and `\\frac{3}{4}` read `3/4`, `2^5` reads nothing.
    """
    text = undressed(text[-_END:])
    matches = list(_IN_TEXT.finditer(text))
    if not matches:
        return None
    start, end = matches[-1].span()
    if _BEFORE.search(text[:start][-12:]) or (_AFTER.match(text, end) and not _ATTACHED.match(text, end)):
        return None
    number = _number(matches[-1])
    return number.text if number is not None else None


def normalise(text: str) -> str:
    """Remove case, spaces, emphasis, dollar signs and fonts."""
    text = _bare(undressed(text)).replace('"', "'")
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    return re.sub(r"(?<![^\W_])\s+|\s+(?![^\W_])", "", " ".join(text.split())).casefold()


def is_text(text: str) -> bool:
    """Whether an answer is words, a date, a time or the like, not an expression to calculate with."""
    unit = _TRAILING_UNIT.search(text)
    if is_two_numbers(text) or _NO_EXPRESSION.search(undressed(text)) or (unit and _NO_UNITS.search(unit[0])):
        return True
    bare = _TRAILING_UNIT.sub(r"\1", text)
    fonts = [found[1] for found in _FONT.finditer(bare)]
    rest = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", _FONT.sub(" ", bare))
    words, names = (_WORD.findall(_CONNECTIVE.sub(" ", part)) for part in (" ".join(fonts), rest))
    longest_name = 3 if re.search(r"[0-9=+*/^\\]", bare) else 1
    is_word = any(len(name) > longest_name and name.casefold() not in _FUNCTIONS for name in names)
    return is_word or any(len(word) > 1 for word in words)


def units_differ(left: str, right: str) -> bool:
    """Whether both answers end in a LaTeX unit, `\\text{ cm}^2`, and the units differ."""
    one, other = (
        undressed(end[0].strip()) if end else "" for end in map(_TRAILING_UNIT.search, (left, right))
    )
    return bool(one and other) and not _same_unit(one, other)


def without_emphasis(text: str) -> str:
    """Remove Markdown emphasis: `**42**` gives `42`."""
    return _EMPHASIS.sub(r"\2", text)


def undressed(text: str) -> str:
    """Convert to plain characters, without LaTeX and Markdown markup."""
    text = without_emphasis(unicodedata.normalize("NFKC", text.translate(_CHARACTERS)))
    if not _LATEX.isdisjoint(text):
        text = _DEGREE.sub("°", _THOUSANDS.sub("", text))
        text = _SPACING.sub(" ", text).replace("{,}", ",").replace("\\%", "%")
        for _ in range(_DEEPEST):
            text = _FONT.sub(r" \1 ", text)
        text = _FRACTION.sub(lambda part: f"\\frac{{{part[1] or part[2]}}}{{{part[3] or part[4]}}}", text)
    return _NOTHING.sub("", text)


def _bare(text: str) -> str:
    """Strip spaces, quotes, a full stop and brackets from around an answer."""
    text = text.strip().rstrip(".,;:").strip()
    while (inside := _INSIDE.fullmatch(text)) is not None:
        text = next(part for part in inside.groups() if part is not None).strip().rstrip(".")
    return text[:-1] if re.fullmatch(r"[A-Za-z]\)", text) else text


def _unit(text: str, start: int) -> str | None:
    """The unit after a number, empty at the end of the text, None where something else follows."""
    rest = text[start:].strip()
    if not rest:
        return ""
    found = _UNIT.fullmatch(rest)
    if found is None or _NO_UNITS.search(rest):
        return None
    word = found["word"] or ""
    is_product = text[start : start + 1].isalpha() and len(word) < 4 and not _ATTACHED.match(rest)
    return None if is_product or (len(word) == 1 and word not in _SINGLE) else rest


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
    rounded = [number.decimals for number in (left, right) if number.decimals is not None]
    # Printing a float can lose one part in 10^15.
    whole = left.value.denominator == right.value.denominator == 1
    noise = bool(rounded) and not whole and gap * 10**15 <= abs(right.value)
    return not gap or noise or any(gap * 2 * 10**decimals <= 1 for decimals in rounded)


def _number(found: re.Match[str], unit: str = "") -> Number | None:
    top = _digits(found["top"] or found["number"])
    bottom = _digits(found["bottom"] or found["denominator"] or "")
    try:
        value = Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
    if found["whole"]:
        if not 0 < value < 1:
            return None
        value += int(found["whole"])
    if found["repeated"]:
        # A number with a power of ten cannot repeat.
        fixed = re.fullmatch(r"[0-9,]*\.([0-9]*)", found["number"] + found["point"])
        if fixed is None or found["whole"]:
            return None
        value += Fraction(int(found["repeated"]), (10 ** len(found["repeated"]) - 1) * 10 ** len(fixed[1]))
    negative = ("-" in (found["sign"] or "")) != bool(found["minus"])
    value = -value if negative else value
    decimals = None
    if found["number"] and not (found["denominator"] or found["whole"] or found["repeated"]):
        parts = Decimal(_digits(found["number"])).as_tuple()
        if isinstance(parts.exponent, int) and parts.exponent < 0 and len(parts.digits) >= 6:
            decimals = -parts.exponent
    sign, whole = "-" * (value < 0), f"{found['whole']} " if found["whole"] else ""
    text = f"{sign}{whole}{top.lstrip('+-')}{'/' * bool(bottom)}{bottom.lstrip('+-')}"
    return Number(
        value, str(value) if found["repeated"] else text, decimals, found["percent"] is not None, unit
    )


def _digits(number: str) -> str:
    return re.sub(r"[\s,{}()]", "", _POWER.sub("e", number))
