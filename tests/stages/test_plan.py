"""Plans of the bundled model, which has a few million parameters: cards are scaled down to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from midtune.bench.workload import PLANNED
from midtune.cli import main
from midtune.config import RunConfig, load_config
from midtune.errors import InputError
from midtune.planning import search
from midtune.planning.budget import peak
from midtune.planning.shared import between_cards
from midtune.planning.step_size import work_of
from midtune.report.plans import plan_table
from midtune.report.terminal import Terminal
from midtune.stages import plan, train
from tests.report.printed import rendered
from tests.stages.conftest import Configured

CONFIG = load_config(None, {"model.name": "tiny"})


@pytest.fixture(scope="module")
def roomy() -> dict[str, Any]:
    return plan.run(CONFIG, gpu="24GB", prompt_tokens=40)


def test_every_arm_is_worked_out(roomy: dict[str, Any]) -> None:
    assert [arm["arm"] for arm in roomy["arms"]] == list(PLANNED)
    for arm in roomy["arms"]:
        assert (arm["phase"], arm["peak"]) == peak(arm["phases"])
        assert arm["fits"] and all(seconds > 0 for seconds in arm["seconds"].values())
    by_name = {arm["arm"]: arm for arm in roomy["arms"]}
    assert by_name["trl-full"]["peak"] < by_name["trl-full-kept"]["peak"]
    assert roomy["fit"] == {} and roomy["fitted"]["peak"] == by_name["midtune"]["peak"]


def test_the_higher_the_block_the_less_memory(roomy: dict[str, Any]) -> None:
    peaks = [row["peak"] for row in roomy["by_block"]]
    assert len(peaks) == 12 and peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    (middle,) = roomy["blocks"]
    assert peaks[middle] == roomy["arms"][0]["peak"]


def test_a_plan_on_80_columns(roomy: dict[str, Any]) -> None:
    lines = rendered(plan_table(roomy))
    assert lines[0] == "tiny on 24GB (RTX 3090)"
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("It fits as asked, with ") for line in lines)
    assert any(line.startswith("keys and values") for line in lines)


@pytest.mark.slow
def test_each_of_several_cards_does_its_share(roomy: dict[str, Any]) -> None:
    shared = plan.run(CONFIG, gpu="24GB", prompt_tokens=40, devices=2)
    assert 2 * shared["work"]["prompts"] == roomy["work"]["prompts"]
    assert shared["arms"][0]["peak"] < roomy["arms"][0]["peak"]
    assert shared["between"]["devices"] == 2


def test_a_plan_for_several_cards(roomy: dict[str, Any]) -> None:
    assert roomy["between"] is None
    with pytest.raises(InputError, match="cannot be shared evenly among 7 processes"):
        plan.run(CONFIG, gpu="24GB", prompt_tokens=40, devices=7)
    between = between_cards(search.planner_of(CONFIG, "24GB"), work_of(CONFIG, 40), roomy["arms"][0], 2)
    lines = rendered(plan_table({**roomy, "between": between}))
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Shared among 2 cards") for line in lines)
    assert any(line.startswith("10-gigabit Ethernet") for line in lines)


def test_a_plan_for_scripts_and_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(
            [
                "plan",
                "tiny",
                "--gpu",
                "cpu",
                "--prompt-tokens",
                "40",
                "--new-tokens",
                "8",
                "--json",
                "--quiet",
            ]
        )
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["new_tokens"] == 8
    # How fast a CPU is stands nowhere.
    assert found["arms"][0]["seconds"]["update"] is None
    assert found["arms"][0]["phases"]["update"]["heap"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "no-such-model"], "did you mean"),
        (["plan", "tiny", "--gpu", "plenty"], "give its memory, such as 24GB"),
        (["plan", "tiny", "--layers", "40"], "40"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_stays_within_what_it_was_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What this process has resident by now is nothing that a plan could know.
    monkeypatch.setattr(train.Meter, "current_bytes", lambda self: 500 * 2**20)
    quick = {
        "model.name": "tiny",
        "training.steps": 1,
        "training.prompts_per_step": 2,
        "task.eval_size": 4,
        "task.train_size": 40,
        "evaluation.samples": 0,
        "evaluation.deployed": False,
        "evaluation.baseline": "estimated",
    }
    config = load_config(None, {**quick, "training.fit": "0.52GB"})
    train.run(config, out=tmp_path / "run", resume=None, terminal=Terminal(quiet=True))
    written: RunConfig = load_config(tmp_path / "run" / "config.yaml", {})
    assert written.training.fit == "none"
    assert 0 < written.training.sampled_prompts <= config.training.prompts_per_step
    assert written != load_config(None, quick)

    with pytest.raises(InputError, match="whatever is made leaner; lower --max-new-tokens"):
        impossible = load_config(None, {**quick, "training.fit": "0.1GB"})
        train.run(impossible, out=tmp_path / "other", resume=None, terminal=Terminal(quiet=True))


def test_a_run_whose_alternatives_cannot_be_worked_out_says_so(
    configured: Configured, tmp_path: Any, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no values\nand more")

    monkeypatch.setattr(search, "whole_update", broken)
    config = configured(evaluation__samples=0, evaluation__deployed=False)
    report = train.run(config, out=tmp_path / "run", resume=None, terminal=terminal)
    assert (report["memory"]["full_peak"], report["memory"]["qlora_peak"]) == (None, None)
    assert report["time"]["full_step"] > 0 and report["time"]["qlora_step"] > 0
    notes = [
        f"Memory of `{arm}` is not known: qwen3 cannot run on tensors without data (no values); measure it with "
        "`midtune bench`."
        for arm in ("trl-full", "trl-qlora")
    ]
    assert report["notes"] == notes
    assert all(note in terminal.console.file.getvalue() for note in notes)  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["notes"] == notes
