from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.config import load_config
from midtune.errors import InputError, MidtuneError
from midtune.model.loading import load_tokenizer
from midtune.model.sources import resolve
from midtune.report.results import bench_table
from midtune.report.terminal import Terminal
from midtune.runs import unsealed
from midtune.stages import bench


def go(checkpoint: Path, out: Path, terminal: Terminal, **changes: Any) -> dict[str, Any]:
    sizes = {
        "prompts": 2,
        "prompt_tokens": 12,
        "new_tokens": 4,
        "group_size": 2,
        "steps": 2,
        "profile": False,
    }
    config = load_config(None, {"model.name": str(checkpoint), **changes.pop("settings", {})})
    return bench.run(config, out=out, terminal=terminal, **{"arms": ["midtune"], **sizes, **changes})


@pytest.fixture(scope="module")
def measured(
    random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of three arms in their own processes: the first is profiled, the second fails."""
    in_own_process = bench.in_own_process

    def failing(job: str, arguments: dict[str, Any], **said: str) -> dict[str, Any]:
        if arguments["arm"] == "trl-block":
            raise MidtuneError("the arm trl-block failed (no memory); leave it out.")
        return in_own_process(job, arguments, **said)

    out, terminal = tmp_path_factory.mktemp("measured") / "bench", Terminal(quiet=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench, "in_own_process", failing)
        arms = ["midtune", "trl-block", "trl-full"]
        return out, go(random_checkpoint("qwen3"), out, terminal, arms=arms, profile=True)


def test_arms_run_in_their_own_processes_and_are_compared(measured: tuple[Path, dict[str, Any]]) -> None:
    out, found = measured
    assert unsealed((out / "bench.json").read_bytes()) == found
    first, full = found["arms"]
    assert (first["arm"], full["arm"]) == ("midtune", "trl-full")
    assert first["ratios"]["step"] == 1
    assert full["ratios"]["update"] == pytest.approx(full["update"]["median"] / first["update"]["median"])
    assert full["completion_tokens"] == first["completion_tokens"] == 4 * 4


def test_a_profile_says_where_the_first_arms_time_goes(measured: tuple[Path, dict[str, Any]]) -> None:
    _, found = measured
    assert found["profile"].keys() == {"rollout", "update"}
    for seconds in found["profile"].values():
        assert seconds["matrix products"] > 0
        assert all(part >= 0 for part in seconds.values())
    # The step that is profiled is not counted.
    assert found["arms"][1]["ratios"] is not None
    # Of a step: 2 prompts of 12 tokens and 4 rows of 3 fed tokens through weights of 64 × (128 + 2 · 64 + 128)
    # for attention and 3 · 64 · 128 for the rest, in 4 blocks; 2 + 12 tokens drawn from 260.
    block = 64 * 384 + 3 * 64 * 128
    assert found["flops"]["rollout"] == 2 * (4 * block * 36 + 260 * 64 * 14)
    # The tail passes forward, backward, and forward again to see how far the step went.
    assert found["flops"]["update"] == 2 * ((3 * (4 - found["block"]) + 1) * block * 36 + 3 * 260 * 64 * 16)
    assert found["peak_flops_per_s"] > 1e9
    assert all(20 < count < 80 for count in found["operators"].values())


def test_an_arm_that_fails_does_not_cost_the_others(measured: tuple[Path, dict[str, Any]]) -> None:
    _, found = measured
    assert list(found["failed"]) == ["trl-block"]
    console = Console(file=io.StringIO(), width=80)
    console.print(bench_table(found))
    assert "The arm trl-block failed (no memory)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_arm_has_to_work(
    random_checkpoint: Callable[..., Path],
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> dict[str, Any]:
        raise MidtuneError("the arm midtune failed (no memory); leave it out.")

    monkeypatch.setattr(bench, "in_own_process", failing)
    with pytest.raises(MidtuneError, match="no memory"):
        go(random_checkpoint("qwen3"), tmp_path / "bench", terminal)


def arm(step: float, tokens: int) -> dict[str, Any]:
    steps = [{"step": step * i, "rollout": step * i / 2, "update": step * i / 2} for i in (1, 2, 3)]
    sizes = {"peak": 300, "libraries": 100, "prompt_tokens": 50, "completion_tokens": tokens}
    return {"arm": "a", "memory_source": "resident", "trainable": 1, "steps": steps, **sizes}


def test_ratios_are_of_medians() -> None:
    first, other = arm(1.0, 24), {**arm(3.0, 24), "peak": 500}
    found = bench.summarise(other, first, rows=24)
    assert found["step"] == {"median": 6.0, "least": 3.0, "greatest": 9.0}
    assert found["ratios"] == {"step": 3.0, "rollout": 3.0, "update": 3.0, "memory": 2.0}
    assert found["tokens_per_s"] == 8.0


def test_unequal_work_has_no_ratio() -> None:
    assert bench.summarise(arm(3.0, 23), arm(1.0, 24), rows=24)["ratios"] is None


def test_prompts_have_about_the_tokens_asked_for(random_checkpoint: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(resolve(str(random_checkpoint("qwen3"))))
    texts = bench.make_prompts(tokenizer, 4, 20)
    assert len(set(texts)) == 4
    assert all(len(tokenizer(text)["input_ids"]) == 20 for text in texts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ["midtune", "trl"]}, "arm trl is not known; choose among midtune, trl-full"),
        ({"arms": []}, "no arm was named"),
        ({"settings": {"blocks.layers": "9"}}, "0 to 3"),
        ({"settings": {"blocks.layers": "1-2"}}, "names 2 blocks"),
    ],
)
def test_bad_input(
    random_checkpoint: Callable[..., Path],
    tmp_path: Path,
    terminal: Terminal,
    changes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(InputError, match=words):
        go(random_checkpoint("qwen3"), tmp_path / "bench", terminal, **changes)
    assert not (tmp_path / "bench").exists()
