"""The script behind the first table of recipes/results/deployment.md, on the bundled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from midtune.model import rounding
from tests.scripts import read_script

ROOT = Path(__file__).parents[1]


def test_each_way_is_measured_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = read_script("deployment/divergence")
    monkeypatch.setattr(rounding, "TOKENS", tokens := rounding.TOKENS)
    ways = ["nearest", "nearest+0,1,2,3,4,5,6,7,8,9,10,11", "calibrated@400", "calibrated"]
    recipe = str(ROOT / "midtune/assets/tiny/recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["divergence.py", recipe, *ways, "--problems", "20", "--texts", "4"])
    script.main()
    found = {line["way"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [*found] == ["none", *ways]
    # With every block unquantized nothing is left.
    assert found[ways[1]]["kl"] == pytest.approx(0, abs=1e-6)
    assert found[ways[1]]["greedy"] == found["none"]["greedy"]
    assert 0 < found["calibrated"]["kl"] < found["nearest"]["kl"]
    assert rounding.TOKENS == tokens
