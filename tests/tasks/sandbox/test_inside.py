import collections
import math
from typing import Any

import pytest

from midtune.tasks.sandbox.inside import Opaque, decode, encode


def no_opaque(value: Any) -> Any:
    raise TypeError(value)


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            0,
            -7,
            2**40,
            1.5,
            -0.0,
            math.inf,
            -math.inf,
            2 - 3j,
            "",
            "a\n'\"\\é\ud800😀",
            b"\x00\xff",
        ),
        *((), (1,), [], [1, [2, (3,)]], {}, {"a": {1: None}, (1, 2): [3]}, set(), {1, "b"}),
    ],
)
def test_values_come_back_as_they_were(value: Any) -> None:
    text = encode(value, no_opaque)
    assert text.isascii()
    assert "\n" not in text
    found = decode(text, no_opaque)
    assert (found, type(found)) == (value, type(value))
    assert math.copysign(1, found) == math.copysign(1, value) if isinstance(value, float) else True


class AlwaysEqual(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]
    __repr__ = __str__ = lambda self: "42"  # type: ignore[assignment]


def test_of_a_subclass_the_plain_value_is_passed() -> None:
    point = collections.namedtuple("point", "x y")(1, 2)
    given = [AlwaysEqual(3), point, collections.Counter("aa"), collections.OrderedDict(b=1)]
    found = decode(encode(given, no_opaque), no_opaque)
    assert found == [3, (1, 2), {"a": 2}, {"b": 1}]
    assert [type(item) for item in found] == [int, tuple, dict, dict]


def test_what_has_no_literal_stays_where_it_is() -> None:
    kept: list[Any] = []
    text = encode([object, 1], lambda value: kept.append(value) or "opaque(0)")
    first, second = decode(text, lambda number: Opaque(number, lambda *call: 5))
    assert (kept, second, first.number, first("x")) == ([object], 1, 0, 5)
    assert first != 0
    huge = 10**5000
    assert decode(encode(huge, no_opaque), no_opaque) == huge


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getpid()",
        "x",
        "[i for i in (1,)]",
        "1 + 1",
        "f'{1}'",
        "set([[]])",
        "eval('1')",
        "1; 2",
        "",
    ],
)
def test_nothing_but_literals_is_read(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError, KeyError, TypeError, AttributeError)):
        decode(text, no_opaque)
