"""What a run would do, said without a network and without weights."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.config import dump_config, load_config
from midtune.errors import InputError
from midtune.report.plans import dry_run_text
from midtune.stages import dry_run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

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
    # 28 blocks, the embedding, which is the head too, and the last norm, in bf16.
    assert found["weights_bytes"] == 2 * (28 * block + 151_936 * 2048 + 2048)
    assert "the weights of Qwen/Qwen3-1.7B-Base, about 3.20 GiB (estimated, as bf16); the" in printed(found)


def test_the_folder_is_the_one_that_a_run_would_get(tmp_path: Path) -> None:
    config = load_config(None, {"model.name": "tiny", "task.name": "reasoning-gym:chain_sum"})
    found = dry_run.run(config, out=None)
    assert (found["out"], found["weights_bytes"]) == ("runs/tiny-chain_sum", None)
    assert not (tmp_path / "runs").exists()
    taken = tmp_path / "runs" / "tiny-chain_sum"
    taken.mkdir(parents=True)
    (taken / "config.yaml").write_text(dump_config(config))
    assert dry_run.run(config, out=None)["out"] == "runs/tiny-chain_sum-2"
    assert dry_run.run(config, out=None, resume=taken)["out"] == "runs/tiny-chain_sum"
    with pytest.raises(InputError, match="holds another run"):
        dry_run.run(config, out=taken)


def test_memory_is_not_known_without_a_configuration() -> None:
    found = dry_run.run(load_config(RECIPES / "study-qwen2.5-math-1.5b-math.yaml", {}), out=None)
    assert (found["plan"], found["note"]) == (None, "memory not known: config not at hand")
    assert "memory not known: config not at hand" in printed(found)


def test_a_model_that_cannot_be_is_refused() -> None:
    config = load_config(None, {"model.name": "no-such", "task.name": "a.jsonl"})
    with pytest.raises(InputError, match="no-such"):
        dry_run.run(config, out=None)
