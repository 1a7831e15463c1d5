from __future__ import annotations

import errno

import pytest

from midtune.errors import (
    WHY,
    InputError,
    RunStopped,
    bounded,
    escaped,
    explained,
    lack_of,
    one_line,
    plain,
    reason,
)


def test_text_of_others_is_shown_without_what_a_terminal_obeys() -> None:
    assert plain("a\x1b[31mb\x07\u202ec\td\n") == "abc\td\n"
    assert escaped('{"a": "\u202e"}') == '{"a": "\\u202e"}'
    assert bounded("abcdef", 2) == "ab… (4 characters left out)"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines."), "two lines"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 300), f"{'x' * 200}… (100 characters left out)"),
    ],
)
def test_a_reason_is_one_line(error: Exception, text: str) -> None:
    assert reason(error) == text


def test_a_librarys_failure_becomes_a_sentence_and_others_pass() -> None:
    with pytest.raises(InputError, match=r"^a.json is damaged \(KeyError\)$"):
        with explained(f"a.json is damaged ({WHY})"):
            raise KeyError
    with pytest.raises(InputError, match="^`f` raised KeyError: 'x'$"):
        with explained(f"`f` raised {WHY}", with_kind=True):
            raise KeyError("x")
    for error in (RunStopped("stop"), MemoryError(), OSError("full")):
        with pytest.raises(type(error)), explained(WHY, keep=(OSError,)):
            raise error


def test_what_a_machine_lacks() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/runs")
    assert lack_of(full) == "the disk is full (/runs); make room"
    assert lack_of(MemoryError()) == "memory ran out; make room"
    assert lack_of(ValueError("x")) is None


def test_a_message_is_one_line_with_an_end() -> None:
    assert one_line("shapes\n  do not match ") == "shapes do not match"
    assert one_line("x" * 500) == "x" * 400 + "… (100 characters left out)"
