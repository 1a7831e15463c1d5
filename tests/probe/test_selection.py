import json
from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.probe.selection import (
    best,
    best_first,
    matching_probe,
    middle,
    parse_layers,
    ranking_of,
    read_probe,
)
from tests.probe.curves import PUBLISHED


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("14", [14]),
        ("10-12", [10, 11, 12]),
        ("3,7", [3, 7]),
        ("7, 3", [3, 7]),
        ("0-2,9", [0, 1, 2, 9]),
        ("1-3,2-4,2", [1, 2, 3, 4]),
        ("29", [29]),
        ("middle", [14]),
    ],
)
def test_layers_are_read_in_order_and_once(text: str, blocks: list[int]) -> None:
    assert parse_layers(text, 30) == blocks


def test_middle_takes_top_k() -> None:
    assert parse_layers("middle", 30, top_k=3) == [13, 14, 15]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("40", "layer 40 was asked for, but the model has 30 blocks, 0 to 29; choose among those."),
        ("3,30", "layer 30 was asked for, but the model has 30 blocks, 0 to 29; choose among those."),
        ("28-33", "layer 30 was asked for, but the model has 30 blocks, 0 to 29; choose among those."),
        ("40-41", "layer 40 was asked for, but the model has 30 blocks, 0 to 29; choose among those."),
        ("3,12-10", "layers `12-10` run backwards; write `10-12`."),
    ],
)
def test_layers_that_do_not_exist_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_layers(text, 30)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["", "abc", "1,", ",", "-1", "1-", "1-2-3", "1.5", "1 2", "middle,3", "9" * 5000]
)
def test_junk_is_not_read(text: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        parse_layers(text, 30)


@pytest.mark.parametrize("num_blocks", range(1, 40))
def test_middle_is_the_published_window_and_has_k_blocks(num_blocks: int) -> None:
    for k in range(1, num_blocks + 1):
        blocks = middle(num_blocks, k)
        assert blocks == list(range(int(num_blocks / 2 - k / 2), int(num_blocks / 2 + k / 2)))
        assert len(blocks) == k


def test_middle_of_the_studied_models() -> None:
    assert middle(28, 5) == [11, 12, 13, 14, 15]
    assert middle(36, 1) == [17]


@pytest.mark.parametrize("top_k", [0, 31])
def test_more_blocks_than_there_are(top_k: int) -> None:
    with pytest.raises(
        InputError, match=f"{top_k} blocks were asked for, but the model has 30; ask for 1 to 30"
    ):
        middle(30, top_k)


def test_the_published_values_rank_block_10_first_and_24_last() -> None:
    found = best_first(dict(enumerate(PUBLISHED)))
    assert found[:5] == [10, 12, 9, 2, 13]
    assert found[-3:] == [23, 20, 24]
    assert sorted(found) == list(range(28))


def test_equal_values_rank_the_deeper_block_first() -> None:
    assert best_first({0: 1.0, 3: 1.0, 2: 2.0}) == [2, 3, 0]


def test_a_ranking_must_be_long_enough_and_of_this_model() -> None:
    with pytest.raises(InputError, match="4 blocks were asked for, but only 3 were ranked"):
        best([20, 3, 11], 30, 4)
    with pytest.raises(InputError, match="the ranking has block 20, but the model has 12 blocks, 0 to 11"):
        best([3, 20], 12, 1)


def test_ranking_of_a_probe() -> None:
    assert ranking_of({"blocks": [{"block": 4, "rank": 2}, {"block": 5, "rank": 1}]}) == [5, 4]


def test_a_probe_is_read_from_its_file_or_its_run_folder(tmp_path: Path) -> None:
    probe = {"method": "gradient", "blocks": [{"block": 4, "score": 0.5, "rank": 1}]}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    assert read_probe(tmp_path / "probe.json") == read_probe(tmp_path) == probe


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[1]",
        '{"blocks": [1]}',
        '{"method": "gradient", "blocks": []}',
        '{"method": "gradient", "blocks": [15]}',
        '{"method": "gradient", "blocks": [{"block": 4}]}',
    ],
)
def test_anything_else_is_no_probe(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(InputError, match="other.json is not a probe.json that can be read; make one with"):
        read_probe(file)
    with pytest.raises(InputError, match="probe.json is not a probe.json that can be read"):
        read_probe(tmp_path)


def test_a_probe_matches_its_model_task_and_revision_only() -> None:
    probe = {"model": "org/m", "task_fingerprint": "f", "revision": None}
    assert matching_probe(probe, "org/m", "f", None)
    assert not matching_probe(probe, "org/n", "f", None)
    assert not matching_probe(probe, "org/m", "g", None)
    assert not matching_probe(probe, "org/m", "f", "abc")
    assert not matching_probe({}, "org/m", "f", None)
