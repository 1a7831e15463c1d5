"""`midtune try` on a small run: which blocks answer, in which form, and from where prompts come."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from midtune import cli
from midtune.config import load_config
from midtune.errors import InputError
from midtune.model.patch import apply_patch
from midtune.report.results import Answers
from midtune.report.terminal import Terminal
from midtune.rl.training import sampling_of
from midtune.rollout.sampling import SamplingLimits
from midtune.rollout.text import sample
from midtune.stages import talk
from midtune.stages.opening import Opened

Finished = tuple[Path, dict[str, Any]]


def answers(folder: Path, terminal: Terminal, **asked: Any) -> list[dict[str, Any]]:
    config = load_config(folder / "config.yaml", {})
    asked = {"base": False, "n": None, "temperature": 0.0} | asked
    return [*talk.run(str(folder), config, **asked, terminal=terminal)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_base_and_trained_answer_as_the_plain_sampler_does(
    finished: Finished, terminal: Terminal, temperature: float
) -> None:
    folder, _ = finished
    found = answers(folder, terminal, n=2, temperature=temperature)
    config = load_config(folder / "config.yaml", {})
    opened = Opened(config, terminal)
    policy, rows = opened.policy(), opened.task.held_out[:2]
    settings = config.training.model_copy(update={"temperature": temperature, "group_size": 1})
    assert [each["prompt"] for each in found] == [row["question"] for row in rows]
    for arm in ("base", "trained"):
        if arm == "trained":
            apply_patch(policy, folder / "patch")
        # Both draw with the same numbers, prompt by prompt.
        torch.manual_seed(config.seed)
        for row, each in zip(rows, found, strict=True):
            ids = policy.tokenizer.apply_chat_template(row["prompt"], return_dict=False)
            limits = SamplingLimits(plain=True)
            rollout = sample(policy, [ids], sampling_of(settings), limits=limits)
            text = policy.tokenizer.decode(rollout.completions()[0], skip_special_tokens=True)
            assert each[arm]["completion"] == text
            # The run's own reward: the share of digits.
            assert each[arm]["score"] == sum(map(str.isdigit, text)) / max(len(text), 1)
    assert any(each["base"]["completion"] != each["trained"]["completion"] for each in found)


def test_text_comes_as_it_is_sampled(finished: Finished, terminal: Terminal) -> None:
    folder, _ = finished
    opened = Opened(load_config(folder / "config.yaml", {}), terminal)
    seen: list[str] = []
    sampling = sampling_of(opened.config.training.model_copy(update={"temperature": 0.0, "group_size": 1}))
    text, ids = talk.complete(opened.policy(), "1 and 1", sampling, None, seen.append)
    assert len(seen) == len(ids) == sampling.max_new_tokens
    assert all(text.startswith(early) for early in seen)


def test_blocks_taken_out_leave_the_base_and_return(finished: Finished, terminal: Terminal) -> None:
    folder, _ = finished
    opened = Opened(load_config(folder / "config.yaml", {}), terminal)
    policy = opened.policy()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = policy.model(ids).logits
        apply_patch(policy, folder / "patch")
        trained = policy.model(ids).logits
        with policy.untrained():
            assert torch.equal(policy.model(ids).logits, before)
        assert torch.equal(policy.model(ids).logits, trained)
    assert not torch.equal(before, trained)


def test_prompts_are_piped_in_line_by_line(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    monkeypatch.setattr("sys.stdin", io.StringIO("2 and 4\n\n3 and 9\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["try", str(folder), "--json", "--quiet"])
    assert ended.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["2 and 4", "3 and 9"]
    assert all(line["answer"] is None and line["trained"]["score"] is None for line in lines)
    with pytest.raises(SystemExit):
        cli.main(["try", str(folder), "--n", "1", "--base", "--quiet"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("> ") and "[answer: " in first
    assert second.startswith("base (")


def test_on_a_terminal_they_stand_side_by_side_in_80_columns() -> None:
    result = {"prompt": "2 + 3?", "answer": "5"}
    result |= {
        "base": {"completion": "four " * 20, "score": 0.0},
        "trained": {"completion": "5", "score": 1.0},
    }
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True, color_system=None).print(Answers(result))
    prompt, _, titles, _, first, *_ = file.getvalue().splitlines()
    assert prompt.strip() == "> 2 + 3?  [answer: 5]"
    assert titles.split() == ["base", "(0)", "trained", "(1)"]
    assert first.split()[-1] == "5" and len(first) <= 80


def test_a_game_is_refused(finished: Finished, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: str) -> None:
        raise InputError(f"{what} knows one turn only.")

    monkeypatch.setattr(Opened, "task", SimpleNamespace(require_one_turn=refuse))
    with pytest.raises(InputError, match="`midtune try` knows one turn only"):
        answers(finished[0], terminal, n=1)
