import pytest

from midtune.measure.cards import Card, CardProcess
from midtune.report.formats import (
    blocks_text,
    bytes_text,
    card_text,
    finite,
    interval_texts,
    percent_text,
    saving_text,
    seconds_text,
    sentence,
    speed_text,
    whole_seconds_text,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1536, "1.5 KiB"),
        (14160384, "13.5 MiB"),
        (2**30 * 5 // 4, "1.25 GiB"),
        (-(2**30), "-1.00 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0002, "0.20 ms"),
        (0.012, "12 ms"),
        (2.312, "2.31 s"),
        (45.21, "45.2 s"),
        (99.96, "1 min 40 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_whole_seconds() -> None:
    assert [whole_seconds_text(s) for s in (0, 7.2, 59.5, 60, 200)] == [
        "0 s",
        "8 s",
        "1 min 00 s",
        "1 min 00 s",
        "3 min 20 s",
    ]


def test_shares_and_comparisons() -> None:
    assert [percent_text(share) for share in (0.026, 0.61, -0.05)] == ["2.6%", "61%", "-5.0%"]
    assert [speed_text(speedup) for speedup in (2.5, 1.0, 0.5)] == [
        "2.5x faster",
        "1.0x faster",
        "2.0x slower",
    ]
    assert [saving_text(saving) for saving in (0.61, -0.05)] == ["61% less", "5.0% more"]


def test_finite() -> None:
    assert [finite(value) for value in (None, float("nan"), float("-inf"), 2)] == [None, None, None, 2.0]


def test_words() -> None:
    assert [blocks_text(blocks) for blocks in ([15], [2, 3])] == ["block 15", "blocks 2, 3"]
    assert [sentence(text) for text in ("in steps 1 to 10 GRPO", "")] == ["In steps 1 to 10 GRPO", ""]


def test_a_card_and_what_else_uses_it() -> None:
    card = Card("RTX 3090", 2**30, 24 * 2**30, [])
    assert card_text(card) == "RTX 3090, 1.00 GiB of 24.00 GiB free"
    others = [CardProcess(7, "ollama", 18 * 2**30), CardProcess(9, "process", None)]
    assert card_text(card._replace(others=others)) == (
        "RTX 3090, 1.00 GiB of 24.00 GiB free; also in use by ollama (7) 18.00 GiB, process (9)"
    )


@pytest.mark.parametrize(
    ("figures", "fractions", "signed", "texts"),
    [
        ((0.45, 0.391, 0.508), True, False, ("45.0%", "39 to 51")),
        ((0.25, -0.02, 0.3), True, True, ("+25.0", "-2 to +30")),
        ((1.25, -1.5, 3.0), False, False, ("1.25", "-1.5 to 3")),
        ((-0.75, -2.0, 0.5), False, True, ("-0.75", "-2 to +0.5")),
        ((0.5, None, float("nan")), True, False, ("50.0%", "")),
        ((None, 0.0, 1.0), True, False, ("-", "")),
    ],
)
def test_intervals(
    figures: tuple[float | None, ...], fractions: bool, signed: bool, texts: tuple[str, str]
) -> None:
    named = dict(zip(("value" if signed else "score", "low", "high"), figures, strict=True))
    assert interval_texts(named, fractions) == texts
