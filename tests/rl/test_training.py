"""The order of a run's rows, and TRL's settings of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig

from midtune.rl.training import in_order, trl_arguments
from tests.rl.toy_training import question_rows, settings_of


def test_all_rows_are_used_before_any_comes_again() -> None:
    rows = question_rows()
    questions = [row["question"] for row in in_order(rows, 15, seed=0)]
    everything = {row["question"] for row in rows}
    assert set(questions[:6]) == set(questions[6:12]) == everything
    assert len(questions) == 15


def test_a_seed_fixes_the_order_of_the_rows() -> None:
    order = partial(in_order, question_rows(), 12)
    assert order(1) == order(1)
    assert order(1) != order(2)


def test_one_card_is_used_where_several_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoCards(GRPOConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            assert self.n_gpu == 0
            self._n_gpu = 2

    monkeypatch.setattr("midtune.rl.training.GRPOConfig", TwoCards)
    args = trl_arguments(
        settings_of(), group_tokens=10, folder=tmp_path, seed=0, device=torch.device("cpu"), checkpoints=False
    )
    assert args.n_gpu == 1
