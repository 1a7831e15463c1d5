"""`midtune tasks`, what is said of a task before a run, and runs with several rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from midtune.config import RunConfig, load_config, with_settings
from midtune.errors import InputError
from midtune.report.results import tasks_text
from midtune.report.terminal import Terminal
from midtune.stages import tasks, train
from tests.stages.conftest import Configured

TASK = """
import random

def rows():
    return [{"prompt": f"{n} + 1?", "answer": n + 1, "level": "easy"} for n in range(12)]

def reward(prompts, completions, answer, **columns):
    return [float(c[-1]["content"] == str(a)) for c, a in zip(completions, answer)]
"""


def of_file(folder: Path, code: str) -> RunConfig:
    (folder / "mine.py").write_text(code)
    return load_config(None, {"model.name": "tiny", "task.name": str(folder / "mine.py")})


def test_a_task_is_shown_with_a_right_and_a_wrong_answer(tmp_path: Path, terminal: Terminal) -> None:
    found = tasks.run(of_file(tmp_path, TASK), terminal)
    number = int(found["answer"])
    assert found["question"] == f"{number - 1} + 1?"
    assert found["right"] == {"completion": str(number), "score": 1.0}
    assert found["wrong"] == {"completion": str(number + 1), "score": 0.0}


def test_a_sound_task_is_said_to_be_so(tmp_path: Path, terminal: Terminal) -> None:
    found = tasks.run(of_file(tmp_path, TASK), terminal, check=True)
    assert found["checked"] == str(tmp_path / "mine.py")
    assert found["findings"][0] == "8 problems to train on and 4 to evaluate on, none of them in both"
    assert "the reward gets the columns `prompt`, `answer`, `level`" in found["findings"]


def test_a_reward_in_doubt_is_said_first(
    tmp_path: Path, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.py").write_text("def zero(completions, **columns): return [0.0] * len(completions)")
    rows = [json.dumps({"prompt": prompt, "answer": 1}) for prompt in (f"{n} + {n} =" for n in range(12))]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    settings = {"task.name": str(tmp_path / "data.jsonl"), "task.reward": f"{tmp_path / 'zero.py'}:zero"}
    config = with_settings(of_file(tmp_path, TASK), settings)
    found = tasks.run(config, terminal, check=True)
    assert len(found["doubts"]) == 1
    Console(width=300).print(tasks_text(found))
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("data.jsonl can be read, but its reward is in doubt")
    assert second.strip().startswith("the reward `zero` never gave more than 0 for")


def test_rows_that_change_from_call_to_call_are_refused(tmp_path: Path, terminal: Terminal) -> None:
    config = of_file(tmp_path, TASK.replace("range(12)", "random.sample(range(10**6), 12)"))
    with pytest.raises(InputError, match="gives other rows when it is read again"):
        tasks.run(config, terminal, check=True)


def test_several_rewards_are_added_up_by_weights_and_logged_one_by_one(
    configured: Configured, tmp_path: Path
) -> None:
    config = configured(
        task__reward=["numeric", "format=0.5", f"{tmp_path / 'reward.py'}:digits=2", "repetition"],
        training__steps=2,
        training__stop_after_equal_rewards=0,
        evaluation__samples=1,
    )
    folder = tmp_path / "run"
    report = train.run(config, out=folder, resume=None, terminal=Terminal(quiet=True))
    assert 0 <= report["quality"]["before"]["score"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        means = line["rewards"]
        assert list(means) == ["numeric", "format", "digits", "repetition"]
        total = means["numeric"] + 0.5 * means["format"] + 2 * means["digits"] + means["repetition"]
        assert line["reward"] == pytest.approx(total, abs=1e-5)
    assert any(line["rewards"]["digits"] > 0 for line in lines)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        text = sample["completion"]
        share = sum(map(str.isdigit, text)) / max(len(text), 1)
        assert sample["reward"] == pytest.approx(2 * share, abs=1.01)
    again = load_config(folder / "config.yaml", {})
    assert again.task.reward == config.task.reward
