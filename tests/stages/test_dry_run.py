"""What a run would do, said without a network and without weights."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.config import load_config
from midtune.errors import InputError
from midtune.report.plans import dry_run_text
from midtune.stages import dry_run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)


def printed(found: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(dry_run_text(found))
    return console.export_text()


def test_a_study_recipe_is_explained() -> None:
    found = dry_run.run(load_config(RECIPES / "study-qwen3-1.7b-numinamath.yaml", {}), out=Path("runs/x"))
    assert found["step"] == {"prompts": 128, "group_size": 4, "completions": 512, "tokens": 512 * 3072}
    assert (found["steps"], found["out"]) == (200, "runs/x")
    assert found["downloads"] == [
        "the weights of Qwen/Qwen3-1.7B-Base",
        "the problems of AI-MO/NuminaMath-CoT",
    ]
    plan = found["plan"]
    # Queries and output of 16 heads, keys and values of 8, of 128 each; three MLP matrices; four norms.
    block = 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128
    assert (plan["blocks"], plan["trainable_parameters"]) == ([10], block)
    assert plan["peak"] > 0 and all(seconds > 0 for seconds in plan["seconds"].values())
    assert f"10: {block:,} parameters trained" in printed(found)


def test_memory_is_not_known_without_a_configuration() -> None:
    found = dry_run.run(load_config(RECIPES / "study-qwen2.5-math-1.5b-math.yaml", {}), out=None)
    assert (found["plan"], found["note"]) == (None, "memory not known: config not at hand")
    assert "memory not known: config not at hand" in printed(found)


def test_a_model_that_cannot_be_is_refused() -> None:
    config = load_config(None, {"model.name": "no-such", "task.name": "a.jsonl"})
    with pytest.raises(InputError, match="no-such"):
        dry_run.run(config, out=None)
