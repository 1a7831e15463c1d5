"""`midtune bench --until`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.config import RunConfig, load_config, with_settings
from midtune.errors import InputError, MidtuneError
from midtune.report.results import bench_table
from midtune.report.terminal import Terminal
from midtune.runs import unsealed
from midtune.stages import learning
from midtune.stages.bench import run as bench
from tests.stages.conftest import Configured

ARMS = ["midtune", "trl-full", "trl-block", "trl-qlora"]


def go(config: RunConfig, out: Path, terminal: Terminal, **changes: Any) -> dict[str, Any]:
    sizes = {"until": "2", "arms": ARMS, "rates": 1, "every": 1}
    return learning.run(config, out=out, terminal=terminal, **{**sizes, **changes})


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are done here, as a process of their own would; the list names them."""
    done: list[str] = []

    def call(job: str, arguments: dict[str, Any], **said: Any) -> dict[str, Any]:
        done.append(said["what"])
        arguments = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(learning.learn_alone(**arguments)))  # type: ignore[no-any-return]

    monkeypatch.setattr(learning, "in_own_process", call)
    return done


def test_arms_are_trained_scored_and_compared(
    configured: Configured,
    in_this_process: list[str],
    tmp_path: Path,
    terminal: Terminal,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(blocks__top_k=2, blocks__layers=None, probe__full_lr=1e-3)
    found = go(config, tmp_path / "until", terminal)
    assert unsealed((tmp_path / "until/learning.json").read_bytes()) == {
        key: value for key, value in found.items() if key != "run"
    }
    assert (tmp_path / "until/learning.svg").read_text().startswith("<?xml")
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert [*arms] == ["midtune", "midtune-span", "trl-full", "trl-block", "trl-qlora"]
    assert "midtune says: 0.0% (0 to 32) after 0 of 2 steps, 0 ms" in capsys.readouterr().out
    assert [arm["blocks"] for arm in arms.values()] == [[1], [1, 2], [], [1], []]
    assert [arm["lr"] for arm in arms.values()] == [1e-2, 1e-2, 1e-3, 1e-2, 1e-2]
    for arm in arms.values():
        assert [(point["step"], point["samples"], point["n"]) for point in arm["points"]] == [
            (0, 0, 8), (1, 8, 8), (2, 16, 8)
        ]  # fmt: skip
        assert arm["points"][0]["seconds"] == 0 < arm["points"][1]["seconds"] < arm["points"][2]["seconds"]
        assert arm["peak"] > arm["libraries"] > 0
    # A single block of four, of the same checkpoint; and nothing is trained by accident.
    block = arms["midtune"]["trainable"]
    assert arms["trl-block"]["trainable"] == block == arms["midtune-span"]["trainable"] // 2
    assert arms["trl-full"]["trainable"] > 4 * block
    # All arms over 4-bit blocks start from one score.
    quantized = {arms[name]["points"][0]["score"] for name in ("midtune", "trl-block", "trl-qlora")}
    assert len(quantized) == 1
    assert found["target"] == arms["trl-full"]["points"][-1]["score"]
    shown = Console(file=io.StringIO(), width=120)
    shown.print(bench_table(found))
    assert "midtune-span" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_is_known_is_not_trained_again(
    configured: Configured, in_this_process: list[str], tmp_path: Path, terminal: Terminal
) -> None:
    config, out = configured(), tmp_path / "until"
    first = go(config, out, terminal, arms=["midtune"], until="1")
    assert len(in_this_process) == 1
    again = go(config, out, terminal, arms=["midtune"], until="1")
    assert again["arms"] == first["arms"]
    assert len(in_this_process) == 1
    # A damaged file, or one of other settings, is no known run.
    (file,) = (out / "arms").glob("*.json")
    file.write_bytes(file.read_bytes()[:-20])
    go(config, out, terminal, arms=["midtune"], until="1")
    go(with_settings(config, {"seed": 1}), out, terminal, arms=["midtune"], until="1")
    assert len(in_this_process) == 3


def test_a_score_ends_an_arm(
    configured: Configured, in_this_process: list[str], tmp_path: Path, terminal: Terminal
) -> None:
    # Every text of digits alone scores; the model reaches one percent at once.
    found = go(configured(), tmp_path / "until", terminal, arms=["midtune", "trl-block"], until="0.1%")
    for arm in found["arms"]:
        assert arm["reached"] == arm["points"][-1]
        assert len(arm["points"]) < 4


def curve(*scores: float, step_s: float = 1.0, **more: Any) -> dict[str, Any]:
    points = [{"step": i, "seconds": i * step_s, "samples": 4 * i, "score": s} for i, s in enumerate(scores)]
    return {"lr": 1.0, "points": points, **more}


def test_the_best_run_of_an_arm_is_compared() -> None:
    found = {
        "midtune": [curve(0.1, 0.2, 0.3, arm="low"), curve(0.1, 0.3, 0.5, arm="high")],
        "trl-full": [curve(0.1, 0.3, 0.4, step_s=10.0), curve(0.1, 0.1, 0.1, step_s=10.0)],
    }
    result = learning.compared(found, None)
    assert (result["target"], result["equal_time"]) == (0.4, 2.0)
    midtune, full = result["arms"]
    assert midtune["arm"] == "high" and [run["score"] for run in midtune["tried"]] == [0.3, 0.5]
    assert (midtune["reached"]["step"], midtune["reached"]["samples"]) == (2, 8)
    # Two seconds are over before its first step is.
    assert (full["at_equal_time"]["step"], full["reached"]["seconds"]) == (0, 20.0)
    # Where all are to reach a score, the first to do so is best.
    result = learning.compared({"midtune": [curve(0, 0.3), curve(0, 0, 0.5), curve(0, 0.6)]}, 0.3)
    assert result["arms"][0]["points"][-1]["score"] == 0.6 or result["arms"][0]["reached"]["seconds"] == 1.0
    assert learning.compared({}, None)["arms"] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [("60", (60, None)), ("1", (1, None)), ("0.45", (None, 0.45)), (".5", (None, 0.5)), ("45%", (None, 0.45)),
     ("37.5 %".replace(" ", ""), (None, 0.375)), ("100%", (None, 1.0))],
)  # fmt: skip
def test_steps_and_scores_cannot_be_confused(text: str, found: tuple[int | None, float | None]) -> None:
    assert learning.parse_until(text) == found


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "0.0", "1.0", "1.5", "-3", "60 steps", "101%", "20m", "nan", "1e2"]
)
def test_anything_else_is_neither(text: str) -> None:
    with pytest.raises(InputError, match="a number of steps such as 60, or a score such as 0.45 or 45%"):
        learning.parse_until(text)


def test_rates_lie_around_the_configured_one() -> None:
    config = load_config(None, {"training.lr": 9e-4})
    assert learning.rates_of("trl-block", config, 3) == pytest.approx([3e-4, 9e-4, 27e-4])
    assert learning.rates_of("trl-full", config, 1) == pytest.approx([9e-5])
    assert learning.rates_of("trl-full", with_settings(config, {"probe.full_lr": 1e-5}), 1) == [1e-5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ["trl"]}, "arm trl is not known; choose among midtune, trl-full"),
        ({"until": "2.5"}, "is neither steps nor a score"),
    ],
)
def test_bad_input(
    configured: Configured, tmp_path: Path, terminal: Terminal, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        go(configured(), tmp_path / "until", terminal, **changes)
    assert not (tmp_path / "until").exists()


def test_an_arm_that_fails_does_not_cost_the_others(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(job: str, arguments: dict[str, Any], **said: Any) -> dict[str, Any]:
        if arguments["arm"] == "trl-full":
            raise MidtuneError(f"{said['what']} failed (no memory); {said['instead']}.")
        return {
            **curve(0.1, 0.2),
            "arm": "midtune",
            "blocks": [2],
            "lr": arguments["lr"],
            "peak": 9,
            "libraries": 1,
        }

    monkeypatch.setattr(learning, "in_own_process", call)
    monkeypatch.setattr(learning, "clock_curve", lambda *_: None)
    found = go(configured(), tmp_path / "until", terminal, arms=["midtune", "trl-full"])
    assert ([arm["arm"] for arm in found["arms"]], found["target"]) == (["midtune"], None)
    assert [*found["failed"]] == ["trl-full-0.001"]


@pytest.mark.slow
def test_the_bundled_model_learns_in_processes_of_their_own(tmp_path: Path, terminal: Terminal) -> None:
    config = load_config(None, {"task.eval_size": 60})
    sizes = {"prompts": 1, "prompt_tokens": 1, "new_tokens": 1, "group_size": 2, "steps": 1, "profile": False}
    found = bench(
        config, until="30", arms=ARMS, rates=1, every=15, out=tmp_path / "until", terminal=terminal, **sizes
    )
    assert found["failed"] == {}
    arms: dict[str, Any] = {arm["arm"]: arm for arm in found["arms"]}
    assert [*arms] == ARMS
    assert arms["midtune"]["points"][-1]["score"] > arms["midtune"]["points"][0]["score"]
    assert arms["midtune"]["points"][-1]["seconds"] < arms["trl-full"]["points"][-1]["seconds"]
