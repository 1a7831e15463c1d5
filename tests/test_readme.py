"""The commands of the README: the first two are run by `.ci/run` as they stand, the others are parsed here."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

from midtune import cli, stages
from midtune.config import RunConfig, TaskConfig, dump_config, load_config
from midtune.tasks import check_reward, load_task

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("midtune ")]


def test_it_opens_with_the_two_commands_that_ci_runs() -> None:
    assert LINES[:2] == ["pip install . && midtune train --top-k 1", "pip install '.[dev]' && pytest"]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in LINES[:2]:
        assert command in ci


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_reach_their_stage(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    run = tmp_path / "runs/smollm2"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config(ROOT / "recipes/smollm2-chain-sum.yaml", {})))
    for name in ("ranking", "other"):
        (tmp_path / "runs" / name).mkdir()
    monkeypatch.chdir(tmp_path)
    reached: list[Any] = []

    def fake(*arguments: Any, **_: Any) -> dict[str, Any]:
        reached.append(arguments)
        return {}

    words = shlex.split(command, comments=True)[1:]
    name = "dry_run" if "--dry-run" in words else {"eval": "evaluate"}.get(words[0], words[0])
    stage = SimpleNamespace(run=fake)
    monkeypatch.setitem(sys.modules, f"midtune.stages.{name}", stage)
    monkeypatch.setattr(stages, name, stage, raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--json"])
    assert ended.value.code == 0
    assert len(reached) == 1


def test_the_task_file_it_shows_is_sound(tmp_path: Path) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "my_task.py"
    path.write_text(code)
    task = load_task(str(path), TaskConfig(train_size=800, eval_size=100), seed=0)
    assert (len(task.train), len(task.held_out)) == (800, 100)
    check_reward(task)


def test_the_environment_it_shows_is_sound(tmp_path: Path) -> None:
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "my_env.py"
    path.write_text(code)
    task = load_task(str(path), TaskConfig(train_size=6, eval_size=3), seed=0)
    check_reward(task)
    assert task.game is not None
    (match,) = task.game.matches(1)
    row = task.train[0]
    assert match.reset(row)["prompt"] == row["prompt"]
    assert match.step("ten") == ("No.", 0.0)
    assert match.step(f" {row['number']}\n") == ("Right.", 1.0)
    assert match.over


def test_named_options_and_files_exist() -> None:
    commands = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert option in known, option
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_defaults_it_names_are_the_defaults() -> None:
    tiny = load_config(None, {})
    assert (tiny.training.steps, tiny.task.eval_size, tiny.evaluation.baseline) == (100, 300, "measured")
    assert RunConfig().evaluation.baseline == "estimated"
