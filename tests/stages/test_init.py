from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midtune.config import load_config
from midtune.errors import InputError
from midtune.report.results import init_text
from midtune.report.terminal import Terminal
from midtune.stages import dry_run, init
from tests.report.printed import rendered

NOTHING: dict[str, Any] = dict.fromkeys(("prompt_column", "answer_column", "reward", "model", "gpu"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def made(data: str | None, terminal: Terminal, **given: Any) -> dict[str, Any]:
    given = NOTHING | {"model": "tiny", "gpu": "8GB"} | given
    return init.run(data, out=Path("r.yaml"), terminal=terminal, **given)


def test_data_with_known_columns_needs_no_answers(terminal: Terminal) -> None:
    data = write("sums.jsonl", [{"question": f"{n} + 1?", "answer": n + 1} for n in range(30)])
    found = made(data, terminal)
    assert found == {
        "file": "r.yaml",
        "model": "tiny",
        "task": data,
        "problems": 20,
        "card": "8GB",
        "changes": {},
    }
    config = load_config(Path("r.yaml"), {})
    assert (config.task.prompt_column, config.task.answer_column) == ("question", "answer")
    assert (config.task.reward, config.task.template, config.task.eval_size) == (["numeric"], "boxed", 10)
    assert config.training.max_new_tokens == 256
    assert dry_run.run(config, out=None)["task"] == data
    assert "it fits as it is" in " ".join(rendered(init_text(found)))
    with pytest.raises(InputError, match=r"r.yaml exists already"):
        made(data, terminal)


def test_worked_solutions_get_room_and_bad_rows_are_left_out(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "_changes", lambda *_: None)
    solution = "We add. " * 150 + "So it is \\boxed{%d}."
    rows = [{"problem": f"{n} + 1?", "solution": solution % (n + 1)} for n in range(30)]
    made(write("proofs.jsonl", [*rows, {"problem": "", "solution": "\\boxed{1}"}]), terminal)
    config = load_config(Path("r.yaml"), {})
    assert config.task.bad_rows == "drop"
    # Twice 1,220 characters, in tokens of three, and up to the next power of two.
    assert config.training.max_new_tokens == 1024
    assert "left out 1 of 31 rows" in terminal.console.file.getvalue()


def test_what_is_missing_is_asked_for(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    write("odd.jsonl", [{"ask": f"{n}?", "reply": "yes"} for n in range(30)])
    typed = {"What to learn": "odd.jsonl", "Column of the prompt": "ask", "Column of the answer": "reply"}
    asked = []

    def ask(self: Terminal, question: str, default: str = "") -> str:
        asked.append((question, default))
        return next((words for start, words in typed.items() if question.startswith(start)), default)

    monkeypatch.setattr(Terminal, "ask", ask)
    monkeypatch.setattr(init, "_changes", lambda *_: None)
    found = made(None, terminal, model=None, gpu="cpu")
    assert [default for _, default in asked] == ["reasoning-gym:chain_sum", "", "", "exact", "smollm2-135m"]
    assert asked[1][0] == "Column of the prompt, of ask, reply"
    assert (found["task"], found["model"]) == ("odd.jsonl", "smollm2-135m")
    assert load_config(Path("r.yaml"), {}).task.template == "none"


@pytest.mark.slow
def test_a_card_is_offered_the_largest_model_that_fits_and_a_leaner_run(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "OFFERED", ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B"))
    data = write("sums.jsonl", [{"question": f"{n} + 1?", "answer": n + 1} for n in range(30)])
    found = made(data, terminal, model=None, gpu="5GB")
    assert found["model"] == "Qwen/Qwen3-0.6B"
    assert found["changes"]
    config = load_config(Path("r.yaml"), {}).model_dump()
    for key, value in found["changes"].items():
        part, _, name = key.partition(".")
        assert config[part][name] == value
