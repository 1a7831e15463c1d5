"""The commands of README and of the guides: run on the bundled model, or parsed where that is not enough."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from packaging.requirements import Requirement

from midtune import cli, stages
from midtune.config import BUNDLED_MODEL, RunConfig, dump_config, load_config, setting
from midtune.runs import RunFolder
from midtune.tasks import check_reward, load_task
from midtune.tasks.hub import is_dataset

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "midtune/assets/tiny/README.md", *sorted(ROOT.glob("recipes/**/*.md"))]
}
README = PAGES["README.md"]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OPENING = ["pip install . && midtune train --top-k 1", "pip install '.[dev]' && pytest"]

# Added to a command that is run: as little work as its stage can do.
_STEP = "--prompts-per-step 2 --group-size 2 --max-new-tokens 4 --eval-size 2 --steps 1"
_TRAIN = "--samples 0 --baseline estimated --set evaluation.deployed=false --set task.train_size=8"
SMALL = {
    "train": f"{_STEP} {_TRAIN}",
    "probe": f"{_STEP} --samples 1 --budget '4 steps' --layers 5,6,7 --seeds 1",
    "eval": "--max-new-tokens 4 --eval-size 2 --samples 4",
    "vote": "--max-new-tokens 4 --eval-size 2 --samples 0",
}
# What they say depends on a card, on other processes and on the network; their own tests run them.
PARSED = {"plan", "bench", "doctor"}
PACKAGES_NEEDED = {"textworld", "alfworld"}


@dataclass(frozen=True)
class Block:
    """A fenced block: ```LANGUAGE FILE."""

    language: str
    file: str
    text: str


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w*) ?(.*?)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [Block(*parts) for parts in found]


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    return [line for line in lines if line and line not in OPENING]


WITH_COMMANDS = [page for page in PAGES if commands(page)]


class Reader:
    """Someone who follows a page from its first command to its last, in a folder of their own.

    Args:
        finished: commands that were run before, and the folders that they left: they are not run again.
    """

    def __init__(self, patched: pytest.MonkeyPatch, finished: dict[str, Path]) -> None:
        self._patched, self._finished = patched, finished

    def follow(self, command: str) -> bool:
        """Run a command if the bundled model is enough for it, else parse it; returns whether it was run."""
        words = shlex.split(command, comments=True)
        if words[0] == "pip":
            return self._installs(words)
        assert words[0] == "midtune", command
        out = Path(words[words.index("--out") + 1]) if "--out" in words else None
        named = self._parsed(words[1:], command)
        if words[1] in PARSED or not all(map(self._is_at_hand, named)):
            if out is not None and words[1] == "train":
                RunFolder.create(out, "").write_config(dump_config(next(self._configs(named))))
            return False
        key = " ".join(words)
        if key in self._finished and out is not None:
            shutil.copytree(self._finished[key], out)
            return True
        small = [] if "--resume" in words else shlex.split(SMALL.get(words[1], ""))
        with pytest.raises(SystemExit) as ended:
            cli.main([*words[1:], *small])
        assert ended.value.code == 0, command
        if out is not None:
            self._finished[key] = out.absolute()
        return True

    def _parsed(self, words: Sequence[str], command: str) -> list[Any]:
        """What the command hands to its stage."""
        reached: list[list[Any]] = []

        def run(*arguments: Any, resume: Path | None = None, **_: Any) -> dict[str, Any]:
            reached.append([*arguments, *([resume] if resume else [])])
            return {}

        name = "dry_run" if "--dry-run" in words else {"eval": "evaluate"}.get(words[0], words[0])
        with self._patched.context() as patched:
            patched.setitem(sys.modules, f"midtune.stages.{name}", SimpleNamespace(run=run))
            patched.setattr(stages, name, SimpleNamespace(run=run), raising=False)
            with pytest.raises(SystemExit) as ended:
                cli.main([*words, "--json"])
        assert ended.value.code == 0, command
        (arguments,) = reached
        return list(self._flat(arguments))

    def _flat(self, arguments: Any) -> Iterator[Any]:
        for argument in arguments:
            yield from self._flat(argument) if isinstance(argument, list | tuple) else [argument]

    def _configs(self, named: Sequence[Any]) -> Iterator[RunConfig]:
        """The configurations among what a stage is given, and those of the runs that it is given."""
        for value in named:
            if isinstance(value, RunConfig):
                yield value
            elif isinstance(value, str | Path) and (Path(value) / "config.yaml").is_file():
                yield RunFolder.open(Path(value)).config

    def _is_at_hand(self, named: Any) -> bool:
        def has(config: RunConfig) -> bool:
            task = config.task.name
            elsewhere = task is not None and (is_dataset(task) or task in PACKAGES_NEEDED)
            return config.model.name == BUNDLED_MODEL and not elsewhere

        return all(map(has, self._configs([named])))

    def _installs(self, words: Sequence[str]) -> bool:
        assert words[1] == "install"
        for word in words[2:]:
            required = Requirement(word)
            assert required.name == "midtune" and required.extras <= EXTRAS.keys(), word
        return False


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    return {}


def test_it_opens_with_the_two_commands_that_ci_runs() -> None:
    lines = [line for block in blocks("README.md") if block.language == "bash" for line in block.text.splitlines()]
    assert lines[:2] == OPENING
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in OPENING:
        assert command in ci


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_its_commands_work_from_top_to_bottom(
    page: str, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    reader = Reader(monkeypatch, finished)
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
    for block in blocks(page):
        if block.language == "bash":
            for command in filter(None, block.text.splitlines()):
                if command not in OPENING:
                    reader.follow(command)
        elif block.language == "python" and not block.file:
            exec(compile(block.text, page, "exec"), {})


def python_files(page: str) -> dict[str, str]:
    return {block.file: block.text for block in blocks(page) if block.language == "python"}


def test_the_environment_that_the_guide_shows_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "my_env.py"
    path.write_text(python_files("recipes/guides/turns.md")["my_env.py"])
    task = load_task(str(path), args={}, reward=None, train_size=6, eval_size=3, seed=0)
    check_reward(task)
    assert task.game is not None
    (match,) = task.game.matches(1)
    row = task.train[0]
    assert match.reset(row)["prompt"] == row["prompt"]
    assert match.step("ten") == ("No.", 0.0)
    assert match.step(f" {row['number']}\n") == ("Right.", 1.0)
    assert match.over


@pytest.mark.parametrize("page", PAGES)
def test_options_and_settings_exist(page: str) -> None:
    found = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    known = {option for command in found for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"`(--[a-z-]+)", PAGES[page]):
        assert option in known, option
    parts = "|".join(RunConfig.model_fields)
    for key in re.findall(rf"(?:`|--set )((?:{parts})\.\w+)(?!\.\w)", PAGES[page]):
        if not key.endswith((".json", ".yaml")):
            assert setting(key) is not None, key


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_guide_is_linked_from_the_readme() -> None:
    guides = [page for page in PAGES if page.startswith("recipes/guides/")]
    assert guides
    for guide in guides:
        assert f"({guide})" in README, guide


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if "results/" not in page or "smollm2" in page])
def test_tables_fit_a_terminal(page: str) -> None:
    assert [line for line in PAGES[page].splitlines() if line.startswith("|") and len(line) > 80] == []


def test_the_readme_is_a_page() -> None:
    assert len(README.splitlines()) <= 130


def test_the_defaults_it_names_are_the_defaults() -> None:
    tiny = load_config(None, {})
    assert (tiny.training.steps, tiny.task.eval_size, tiny.evaluation.baseline) == (100, 300, "measured")
    assert RunConfig().evaluation.baseline == "estimated"
