from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.errors import InputError
from midtune.report.results import compare_table
from midtune.report.terminal import Terminal
from midtune.stages import compare
from tests.probe.curves import PUBLISHED
from tests.report.printed import rendered
from tests.report.toy_probe import toy_probe


def compared(
    folder: Path, *probes: dict[str, Any], top_k: int = 2, out: Path | None = None
) -> dict[str, Any]:
    files = []
    for number, probe in enumerate(probes):
        files.append(folder / f"{number}.json")
        files[-1].write_text(json.dumps(probe))
    return compare.run(files, top_k=top_k, out=out, terminal=Terminal(quiet=True))


def test_two_rankings_worked_by_hand(tmp_path: Path) -> None:
    """Neighbours are swapped twice: ρ = 1 − 6·4/(5·24), τ = (8 − 2)/10; the best two share one of five."""
    first, second = toy_probe([1, 2, 3, 4, 5]), toy_probe([2, 1, 4, 3, 5])
    found = compared(tmp_path, first, second)
    (pair,) = found["pairs"]
    assert {key: pair[key] for key in ("first", "second", "matched", "compared", "blocks", "top_k")} == {
        "first": 0,
        "second": 1,
        "matched": "block",
        "compared": "score",
        "blocks": 5,
        "top_k": 2,
    }
    assert pair["spearman"] == pytest.approx({"value": 0.8, "low": -0.4571, "high": 0.9908}, abs=1e-4)
    assert pair["kendall"] == pytest.approx({"value": 0.6, "low": -0.5388, "high": 0.9633}, abs=1e-4)
    # Best two: 3, 4 and 2, 4. Of the ten pairs of five blocks, three have neither 3 nor 4.
    assert (pair["overlap"], pair["expected"], pair["p"]) == (1, 0.8, pytest.approx(0.7))
    assert found["rankings"][0] == {
        "file": str(tmp_path / "0.json"),
        "model": "toy",
        "revision": None,
        "task": "sums",
        "method": "sweep",
        "seed": 0,
        "num_blocks": 5,
        "ranked": 5,
        "compared": "score",
        "depth": {"value": -1.0, "low": None, "high": None},
        "middle": {
            "value": 0.0,
            "low": pytest.approx(-0.8823, abs=1e-4),
            "high": pytest.approx(0.8823, abs=1e-4),
        },
    }


def test_the_published_values_and_their_reverse(tmp_path: Path) -> None:
    backwards = [-value for value in PUBLISHED]
    found = compared(tmp_path, toy_probe(PUBLISHED), toy_probe(PUBLISHED), toy_probe(backwards), top_k=5)
    same, reverse, _ = found["pairs"]
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert (same["spearman"]["value"], same["kendall"]["value"], same["overlap"]) == (1.0, 1.0, 5)
    assert same["p"] == pytest.approx(1 / 98280)
    assert (reverse["spearman"]["value"], reverse["kendall"]["value"], reverse["overlap"]) == (-1.0, -1.0, 0)
    assert reverse["p"] == 1
    depth, middle = found["rankings"][0]["depth"], found["rankings"][0]["middle"]
    assert (depth["value"], middle["value"]) == pytest.approx((0.63, 0.49), abs=0.005)
    assert depth["low"] == pytest.approx(0.30, abs=0.01)


def test_other_numbers_of_blocks_meet_at_relative_depths(tmp_path: Path) -> None:
    """At the depths of four blocks, seven have the values of blocks 0, 2, 4 and 6."""
    small, large = toy_probe([1, 2, 4, 3]), toy_probe([1, 9, 2, 9, 4, 9, 3])
    for pair in (compared(tmp_path, small, large)["pairs"][0], compared(tmp_path, large, small)["pairs"][0]):
        assert (pair["matched"], pair["blocks"]) == ("depth", 4)
        assert pair["spearman"] == {"value": 1.0, "low": None, "high": None}
    # Of six blocks, the second of four lies between blocks 1 and 2, at 2/3: 1 + 2/3 (4 − 1).
    one, other = toy_probe([1.0, 1.0, 4.0, 2.0, 2.0, 2.0]), toy_probe([0.0, 3.0, 2.0, 1.0])
    assert compared(tmp_path, one, other)["pairs"][0]["spearman"]["value"] == pytest.approx(0.9487, abs=1e-4)


def test_only_blocks_that_both_rank_count(tmp_path: Path) -> None:
    first, second = toy_probe(PUBLISHED), toy_probe(PUBLISHED)
    first["blocks"], second["blocks"] = first["blocks"][:12], second["blocks"][8:]
    second["blocks"][0]["score"] = None
    assert compared(tmp_path, first, second)["pairs"][0]["blocks"] == 3


def test_contributions_are_compared_where_all_have_one(tmp_path: Path) -> None:
    shares, scores = toy_probe([1, 2, 3, 4], full=2), toy_probe([1, 2, 3, 4])
    found = compared(tmp_path, shares, shares, scores)
    assert [pair["compared"] for pair in found["pairs"]] == ["contribution", "score", "score"]
    shares["blocks"][0]["contribution"] = None
    assert compared(tmp_path, shares, shares)["pairs"][0]["compared"] == "score"


def test_equal_values_have_no_correlation(tmp_path: Path) -> None:
    pair = compared(tmp_path, toy_probe([1, 1, 1]), toy_probe([1, 2, 3]))["pairs"][0]
    assert (pair["spearman"], pair["kendall"], pair["overlap"]) == (None, None, 2)


def test_an_old_file_is_as_deep_as_its_deepest_block(tmp_path: Path) -> None:
    probe = toy_probe([1, 2, 3, 4])
    del probe["num_blocks"]
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    terminal = Terminal(Console(file=io.StringIO(), width=300))
    found = compare.run([tmp_path, tmp_path], top_k=1, out=None, terminal=terminal)
    assert [ranking["num_blocks"] for ranking in found["rankings"]] == [4, 4]
    assert isinstance(terminal.console.file, io.StringIO)
    assert "how many blocks the model has; 4 are assumed" in terminal.console.file.getvalue()


def test_wrong_input(tmp_path: Path) -> None:
    probe = toy_probe([1, 2, 3, 4])
    with pytest.raises(
        InputError, match="^1 ranking was given, but a comparison takes two or more; name the"
    ):
        compared(tmp_path, probe)
    with pytest.raises(InputError, match="1.json is not a probe.json that can be read; make one with"):
        compared(tmp_path, probe, {"blocks": [1]})
    few = {**probe, "blocks": probe["blocks"][:2]}
    with pytest.raises(
        InputError, match="0.json and .*1.json have 2 ranked blocks in common.* needs 3; rank"
    ):
        compared(tmp_path, probe, few)
    for top_k in (0, 5):
        with pytest.raises(InputError, match=f"^the best {top_k} blocks .* ask for 1 to 4 with --top-k"):
            compared(tmp_path, probe, probe, top_k=top_k)
    with pytest.raises(InputError, match=r"a\.txt was to be a picture, but .*\.svg, \.png, \.pdf; choose"):
        compared(tmp_path, probe, probe, out=tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"a\.svg cannot be written because .*none is no folder; choose"):
        compared(tmp_path, probe, probe, out=tmp_path / "none" / "a.svg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.json", "1.json"]


def test_the_picture_names_the_rankings(tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    compared(tmp_path, toy_probe([1, 2, 3], full=2), toy_probe([1, 1, 1, 1]), top_k=1, out=picture)
    text = picture.read_text(encoding="utf-8")
    for words in (
        "1: toy on sums, sweep, seed 0: C(k)",
        "2: toy on sums, sweep, seed 0: gain",
        "relative depth",
    ):
        assert words in text


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    order = [0.3, -0.1, 0.5, 0.2, 0.4, 0.1]
    found = compared(tmp_path, toy_probe([0, 1, 2, 3, 4, 5]), toy_probe(order), toy_probe(order + order))
    for number, ranking in enumerate(found["rankings"]):
        ranking["file"] = f"{number}.json"
    lines = rendered(compare_table(found))
    assert lines[0] == "1  0.json: toy on sums, sweep, seed 0, 6 of 6 blocks"
    assert lines[4].split() == ["pair", "blocks", "Spearman", "Kendall", "top", "2", "p"]
    assert lines[6].split() == [
        *("1,", "2", "6", "-0.03", "(-0.82", "to", "0.80)", "-0.07", "(-0.75", "to", "0.69)"),
        *("1", "(0.7)", "0.600"),
    ]
    assert lines[12].split()[:2] == ["1", "-1.00"]
    assert "Compared: scores." in lines
    assert "Matched by relative depth, the ranking with more blocks interpolated: 1, 3; 2," in lines
    found["pairs"][0]["compared"] = "contribution"
    assert "Compared: C(k) for 1, 2, scores for the others." in rendered(compare_table(found))


def test_the_widest_figures_fit() -> None:
    figures = {"value": -0.55, "low": -0.75, "high": -0.25}
    pair = {
        "matched": "block",
        "compared": "score",
        "blocks": 126,
        "spearman": figures,
        "kendall": figures,
        "top_k": 10,
        "overlap": 10,
        "expected": 0.8,
        "p": 1e-9,
    }
    ranking = {"file": "a", "model": "m", "task": "t", "method": "sweep", "seed": 0, "num_blocks": 126}
    ranking |= {"ranked": 126, "depth": figures, "middle": None}
    result = {"rankings": [ranking] * 12, "pairs": [{"first": 10, "second": 11, **pair}]}
    (line,) = [line for line in rendered(compare_table(result)) if line.startswith("11, 12")]
    assert line.endswith("10 (0.8)  <0.001")


def test_signals_are_held_against_gains_and_position(tmp_path: Path) -> None:
    cheap, sweep = toy_probe([1, 2, 3, 4, 5]), toy_probe([5, 4, 3, 2, 1])
    for row in cheap["blocks"]:
        row["signals"] = {"norm": -row["block"], "change": [0, 2, 4, 2, 0][row["block"]]}
    (pair,) = compared(tmp_path, cheap, sweep)["pairs"]
    values = {name: found["value"] for name, found in pair["signals"].items()}
    assert values == pytest.approx({"norm": 1, "change": 0, "depth": 1, "middle": 0})
    lines = rendered(compare_table(compared(tmp_path, cheap, sweep)))
    assert any(line.startswith("position: closeness to the middle") for line in lines)
    assert compared(tmp_path, sweep, sweep)["pairs"][0]["signals"] is None


def test_the_blocks_of_a_race_go_by_rank(tmp_path: Path) -> None:
    sweep, race = toy_probe([1, 2, 3, 4, 5]), toy_probe([1, 2, 3, 4, 5])
    race["method"] = "race"
    for row in race["blocks"]:
        row["rank"] = row["block"] + 1
    assert compared(tmp_path, sweep, race)["pairs"][0]["spearman"]["value"] == -1
