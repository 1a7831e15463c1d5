"""Plans of the bundled model, which has a few million parameters: cards are scaled down to it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from midtune.cli import main
from midtune.config import RunConfig, load_config
from midtune.errors import InputError
from midtune.planning.budget import peak
from midtune.planning.step_size import Work
from midtune.report.plans import plan_table
from midtune.stages import plan
from midtune.stages.plan import planner_of, settings_of, work_of
from tests.report.printed import rendered

CONFIG = load_config(None, {"model.name": "tiny"})


@pytest.fixture(scope="module")
def roomy() -> dict[str, Any]:
    return plan.run(CONFIG, gpu="24GB", prompt_tokens=40)


def test_every_arm_is_worked_out(roomy: dict[str, Any]) -> None:
    assert [arm["arm"] for arm in roomy["arms"]] == list(plan.ARMS)
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


def test_what_is_the_largest_fits_and_more_does_not(roomy: dict[str, Any]) -> None:
    work = Work(**roomy["work"])
    assert roomy["largest"]["group_size"] == plan.MOST["group_size"]
    assert roomy["largest"]["new_tokens"] > work.new_tokens


def test_three_cards_are_met_in_three_ways() -> None:
    work = work_of(CONFIG, 40)
    chosen = {}
    for gigabytes in (1.0, 0.72, 0.68):
        own, _ = planner_of(CONFIG, f"{gigabytes}GB")
        fit = own.fitting(work)
        assert fit is not None
        assert peak(own.phases("midtune", fit))[1] <= gigabytes * 2**30
        chosen[gigabytes] = settings_of(fit, work)
    assert chosen[1.0] == {}
    assert chosen[0.72].keys() < chosen[0.68].keys() or chosen[0.72] != chosen[0.68]
    assert planner_of(CONFIG, "0.58GB")[0].fitting(work) is None


def test_an_embedding_that_is_not_the_head_leaves_the_card_first() -> None:
    config = load_config(None, {"model.name": "Qwen/Qwen3-8B"})
    own, _ = planner_of(config, "14GB")
    work = work_of(config, 512)
    fit = own.fitting(work)
    assert fit is not None
    assert settings_of(fit, work)["model.embeddings"] == "host"
    at_home = replace(fit, host_embedding=False)
    assert (
        own.phases("midtune", at_home)["update"]["embeddings and head"]
        - own.phases("midtune", fit)["update"]["embeddings and head"]
        == 2 * own.sizes.embedding
    )


def test_a_plan_on_80_columns(roomy: dict[str, Any]) -> None:
    lines = rendered(plan_table(roomy))
    assert lines[0] == "tiny on 24GB (RTX 3090)"
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("It fits as asked, with ") for line in lines)
    assert any(line.startswith("keys and values") for line in lines)


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


def test_settings_are_those_of_the_configuration() -> None:
    config = load_config(None, {"model.name": "tiny", "training.sampled_prompts": 2, "model.unpack": "never"})
    work = work_of(config, 40)
    assert (work.sampled_prompts, work.unpack) == (2, False)
    assert work.micro_prompts == config.training.prompts_per_step
    assert settings_of(work, work) == {}


def test_a_run_stays_within_what_it_was_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from midtune.report.terminal import Terminal
    from midtune.stages import train

    monkeypatch.chdir(tmp_path)
    # What this process has resident by now is nothing that a plan could know.
    monkeypatch.setattr(train.Meter, "current_bytes", lambda self: 500 * 2**20)
    quick = {
        "model.name": "tiny",
        "training.steps": 1,
        "task.eval_size": 4,
        "task.train_size": 40,
        "evaluation.samples": 0,
        "evaluation.deployed": False,
    }
    config = load_config(None, {**quick, "training.fit": "0.52GB"})
    train.run(config, out=tmp_path / "run", resume=None, terminal=Terminal(quiet=True))
    written: RunConfig = load_config(tmp_path / "run" / "config.yaml", {})
    assert written.training.fit is None
    assert 0 < written.training.sampled_prompts <= config.training.prompts_per_step
    assert written != load_config(None, quick)

    with pytest.raises(InputError, match="whatever is made leaner; lower --max-new-tokens"):
        impossible = load_config(None, {**quick, "training.fit": "0.1GB"})
        train.run(impossible, out=tmp_path / "other", resume=None, terminal=Terminal(quiet=True))


def test_a_step_beyond_any_is_refused() -> None:
    config = load_config(None, {"training.group_size": 10_000, "training.prompts_per_step": 10_000})
    with pytest.raises(
        InputError, match="a step of 100,000,000 completions .* at most 100,000,000 are planned"
    ):
        work_of(config, 512)
