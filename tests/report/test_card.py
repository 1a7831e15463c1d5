"""The model card says what was gained in which form, how to load it, and whose licence holds."""

from __future__ import annotations

from typing import Any

import pytest

from midtune.report.card import FORMS, form_rows, model_card
from tests.report.toy_run import QUALITY, toy_report


def entry(scores: dict[str, Any] | None) -> dict[str, Any]:
    return {"path": "x", "bytes": 1, "dtype": "float32", "tensors": 11, "computes": "cpu", "scores": scores}


def test_forms_are_beside_the_run_and_replace_its_own_unquantized_score() -> None:
    row = ["25.0% (20 to 30)", "50.0% (45 to 55)", "+25.0 (+20 to +30)"]
    assert form_rows(toy_report(), {}) == [["in the run", *row], ["unquantized", *row]]
    other = {**QUALITY, "gain": {"value": 0.1, "low": 0.0, "high": 0.2}}
    rows = form_rows(toy_report(), {"nf4": entry(other), "gguf": entry(None), "hf": entry(QUALITY)})
    assert [name for name, *_ in rows] == ["in the run", "4-bit, as trained", "unquantized"]
    assert rows[1][3] == "+10.0 (+0 to +20)"


def test_a_card_of_a_hub_model() -> None:
    card = model_card(toy_report(), "nf4", "me/sums", base="org/toy", licence="apache-2.0")
    assert card.startswith("---\nbase_model: org/toy\nlicense: apache-2.0\npipeline_tag: text-generation\n")
    for part in (
        "# me/sums",
        "org/toy after reinforcement learning of blocks 2, 3 alone on sums",
        "| in the run | 25.0% (20 to 30) | 50.0% (45 to 55) | +25.0 (+20 to +30) |",
        "Greedy answers to 300 held-out problems",
        'AutoModelForCausalLM.from_pretrained("me/sums")',
        "pip install transformers bitsandbytes",
        "The licence of the base model is apache-2.0.",
    ):
        assert part in card


@pytest.mark.parametrize("form", FORMS)
def test_a_card_without_a_run_claims_nothing(form: str) -> None:
    card = model_card({}, form, "blocks")
    assert "What it gained" not in card and "license:" not in card and "base_model:" not in card
    assert "is not known here; look it up" in card
    assert "blocks" in card.partition("## How to load it")[2]
