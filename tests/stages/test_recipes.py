from __future__ import annotations

from pathlib import Path

import pytest

from midtune.config import load_config
from midtune.errors import InputError
from midtune.recipes import recipes as shipped
from midtune.report.results import recipes_text
from midtune.report.terminal import Terminal
from midtune.stages import recipes
from tests.report.printed import rendered


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_recipes_are_listed_with_what_was_measured(terminal: Terminal) -> None:
    found = recipes.run(None, None, out=None, terminal=terminal)
    listed = {recipe["name"]: recipe for recipe in found["recipes"]}
    assert listed.keys() == shipped().keys()
    math = listed["smollm2-math"]
    assert (math["model"], math["task"]) == ("smollm2-135m", "word_problems.py")
    assert math["about"] == (
        "SmolLM2-135M-Instruct learns word problems of one step, which a task file makes up"
    )
    assert math["measured"].startswith("greedy 23.5% to 100.0%")
    assert listed["qwen3-4b-gsm8k"]["measured"] is None
    shown = "\n".join(rendered(recipes_text(found)))
    assert "qwen3-4b-gsm8k" in shown and "not run yet" in shown


def test_a_recipe_is_shown_as_it_is(terminal: Terminal) -> None:
    found = recipes.run("show", Path("smollm2-code"), out=None, terminal=terminal)
    assert found["text"] == shipped()["smollm2-code"].read_text()


def test_a_copy_has_its_task_file_and_can_be_run(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    out = Path("own/mine.yaml")
    found = recipes.run("copy", Path("smollm2-math"), out=out, terminal=terminal)
    assert found == {"copied": ["own/mine.yaml", "own/word_problems.py"]}
    assert load_config(out, {}).task.name == "own/word_problems.py"
    with pytest.raises(InputError, match="own/mine.yaml exists already"):
        recipes.run("copy", Path("smollm2-math"), out=out, terminal=terminal)
    # Nothing is written where one of its files is in the way.
    with pytest.raises(InputError, match="own/word_problems.py exists already"):
        recipes.run("copy", Path("smollm2-math"), out=Path("own/other.yaml"), terminal=terminal)
    assert not Path("own/other.yaml").exists()


@pytest.mark.parametrize("asked", [("show", None), ("delete", Path("smollm2-math"))])
def test_another_action_is_refused(terminal: Terminal, asked: tuple[str, Path | None]) -> None:
    with pytest.raises(InputError, match="write `midtune recipes show NAME`"):
        recipes.run(*asked, out=None, terminal=terminal)
