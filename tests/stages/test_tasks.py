"""`midtune tasks`, what is said of a task before a run, and runs with several rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midtune.config import RunConfig, load_config, with_settings
from midtune.errors import InputError
from midtune.report.results import tasks_text
from midtune.report.terminal import Terminal
from midtune.stages import tasks, train
from midtune.stages.opening import Opened
from tests.stages.conftest import Configured

TASK = """
import random

def rows():
    return [{"prompt": f"{n} + 1?", "answer": n + 1, "level": "easy"} for n in range(12)]

def reward(prompts, completions, answer, **columns):
    return [float(c[-1]["content"] == str(a)) for c, a in zip(completions, answer)]
"""
PROMPTS = [f"{n} + {n} = {'? ' * n}" for n in range(12)]


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
    rows = [json.dumps({"prompt": prompt, "answer": 1}) for prompt in PROMPTS]
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


def test_long_prompts_are_counted_and_refused_or_dropped(
    configured: Configured, terminal: Terminal, tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in PROMPTS]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    of_long: dict[str, Any] = {
        "task__name": str(tmp_path / "long.jsonl"),
        "task__reward": "numeric",
        "task__prompt_format": "plain",
        "task__eval_size": 4,
    }
    whole = Opened(configured(**of_long), terminal).task
    assert len(whole.train) + len(whole.held_out) == 12
    with pytest.raises(
        InputError, match=r"\d of 12 prompts are longer than 20 tokens, the longest \d\d; raise"
    ):
        _ = Opened(configured(**of_long, task__max_prompt_tokens=20), terminal).task
    short = Opened(configured(**of_long, task__max_prompt_tokens=20, task__bad_rows="drop"), terminal).task
    kept = {row["question"] for row in [*short.train, *short.held_out]}
    assert PROMPTS[0] in {f"{question} " for question in kept}
    assert PROMPTS[11].strip() not in kept
    assert short.note is not None and "left them out" in short.note


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
