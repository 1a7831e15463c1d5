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
from midtune.config import BUNDLED_MODEL, SETTINGS, RunConfig, TaskConfig, dump_config, load_config
from midtune.runs import RunFolder
from midtune.tasks import check_reward, load_task
from midtune.tasks.sources.hub_dataset import is_dataset
from tests.tasks.conftest import opened

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "midtune/assets/tiny/README.md",
        *sorted(ROOT.glob("recipes/**/*.md")),
    ]
}
README = PAGES["README.md"]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OPENING = ["pip install . && midtune train --top-k 1", "pip install '.[dev]' && pytest"]

# Added to a command that is run: as little work as its stage can do.
_STEP = "--steps 1 --prompts-per-step 2 --group-size 2 --max-new-tokens 4 --eval-size 2"
SMALL = {
    "train": f"{_STEP} --baseline estimated --set evaluation.deployed=false --set task.train_size=8",
    "probe": f"{_STEP} --samples 1 --budget '4 steps' --layers 5,6,7 --seeds 1",
    "eval": "--max-new-tokens 4 --eval-size 2",
    "vote": "--max-new-tokens 4 --eval-size 2 --samples 0",
    "compare": "--top-k 2",
    "try": "--max-new-tokens 4",
    "tasks": "--set sandbox.allow_weak=true",
}
# What they say depends on a card, on processes of their own or on the network; their own tests run them.
PARSED = {"plan", "bench", "doctor"}
GAMES = {"frozen-lake", "textworld", "alfworld"}  # each needs a package


@dataclass(frozen=True)
class Block:
    """A fenced block: ```LANGUAGE FILE."""

    language: str
    file: str
    text: str


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w*) ?(.*?)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [Block(*parts) for parts in found]


def steps(page: str) -> list[tuple[str, str]]:
    """What a reader does: (`bash`, a command) or (`python`, code), in the page's order."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            found += [("bash", line) for line in block.text.splitlines() if line and line not in OPENING]
        elif block.language == "python" and not block.file:
            found.append(("python", block.text))
    return found


pytestmark = pytest.mark.usefixtures("traced_once")

WITH_COMMANDS = [page for page in PAGES if steps(page)]


class Reader:
    """Someone who follows a page from top to bottom, in the current folder.

    Every command is parsed as it stands, up to its stage. Beyond that it is run, made small, if the bundled model is
    enough for it. A run or a ranking takes seconds, so it is made if a later command of the page reads it. Of any
    other one, the task is read and tried.

    Args:
        made: what was run → the folder that it left.
    """

    def __init__(self, patched: pytest.MonkeyPatch, made: dict[str, Path]) -> None:
        self._patched, self._made = patched, made

    def follow(self, command: str, later: Sequence[str]) -> None:
        words = shlex.split(command, comments=True)
        if words[0] in ("torchrun", "accelerate"):
            # `-m midtune` and what follows; tests/test_processes.py runs launchers.
            words = words[words.index("-m") + 1 :]
        if words[0] == "pip":
            return check_installed(words)
        assert words[0] == "midtune", command
        configs = list(configs_in(self._stage_arguments(words[1:])))
        out = Path(words[words.index("--out") + 1]) if "--out" in words else None
        small = shlex.split(SMALL.get(words[1], ""))
        # A run of another seed, or on another page, would only take the same time again.
        work = re.sub(r" --(seed|out) \S+", "", shlex.join(words))
        if words[1] in PARSED:
            return None
        if words[1] in ("train", "probe") and not (out and any(str(out) in other for other in later)):
            for config in configs:
                self._try_task(config)
        elif any(config.model.name != BUNDLED_MODEL for config in configs):
            if out is not None and words[1] == "train":
                RunFolder.create(out, "").begin(dump_config(configs[0]), "cpu", 0)
        elif out is not None and work in self._made:
            shutil.copytree(self._made[work], out)
        else:
            run([*words[1:], *small])
            if out is not None:
                self._made[work] = out.absolute()

    def _try_task(self, config: RunConfig) -> None:
        task = config.task.name
        assert task is not None
        if not is_dataset(task) and task not in GAMES:
            Path("tried.yaml").write_text(dump_config(config))
            few = ["--set", "task.train_size=8", "--set", f"task.eval_size={min(config.task.eval_size, 8)}"]
            run(["tasks", "check", task, "--recipe", "tried.yaml", *few, *shlex.split(SMALL["tasks"])])

    def _stage_arguments(self, words: Sequence[str]) -> list[Any]:
        reached: list[list[Any]] = []

        def stage(*arguments: Any, resume: Path | None = None, **_: Any) -> dict[str, Any]:
            reached.append([*arguments, resume])
            return {}

        name = cli.COMMANDS[words[0]].stage or words[0]
        name = "dry_run" if "--dry-run" in words and words[0] == "train" else name
        with self._patched.context() as patched:
            if words[0] == "train" and "--devices" in words:
                # As one of the processes, instead of starting them.
                patched.setenv("WORLD_SIZE", words[words.index("--devices") + 1])
            patched.setitem(sys.modules, f"midtune.stages.{name}", SimpleNamespace(run=stage))
            patched.setattr(stages, name, SimpleNamespace(run=stage), raising=False)
            run([*words, "--json"])
        (arguments,) = reached
        return arguments


def run(words: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 0, shlex.join(["midtune", *words])


def configs_in(arguments: Sequence[Any]) -> Iterator[RunConfig]:
    """The configurations that a stage is given, and those of the runs that it is given."""
    for argument in arguments:
        if isinstance(argument, list):
            yield from configs_in(argument)
        elif isinstance(argument, RunConfig):
            yield argument
        elif isinstance(argument, str | Path) and (Path(argument) / "config.yaml").is_file():
            yield load_config(Path(argument) / "config.yaml", {})


def check_installed(words: Sequence[str]) -> None:
    assert words[1] == "install"
    for word in words[2:]:
        required = Requirement(word)
        assert required.name == "midtune" and required.extras <= EXTRAS.keys(), word


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {}


def test_it_opens_with_the_two_commands_that_ci_runs() -> None:
    assert [block.text for block in blocks("README.md")][:2] == [f"{command}\n" for command in OPENING]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in OPENING:
        assert command in ci


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_work_from_top_to_bottom(
    page: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.endswith("programs.md"):
        # Skips where no program can be run.
        opened(allow_weak=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
    reader, found = Reader(monkeypatch, made), steps(page)
    for place, (language, text) in enumerate(found, 1):
        if language == "bash":
            reader.follow(text, [later for _, later in found[place:]])
        else:
            exec(compile(text, page, "exec"), {})


def test_the_environment_that_the_guide_shows_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "my_env.py"
    (code,) = [block.text for block in blocks("recipes/guides/turns.md") if block.file == path.name]
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


@pytest.mark.parametrize("page", PAGES)
def test_options_and_settings_exist(page: str) -> None:
    found = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    known = {
        option
        for command in found
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for option in re.findall(r"`(--[a-z-]+)", PAGES[page]):
        assert option in known, option
    parts = "|".join(RunConfig.model_fields)
    for key in re.findall(rf"(?:`|--set )((?:{parts})\.\w+)(?!\.\w)", PAGES[page]):
        if not key.endswith((".json", ".yaml")):
            assert key in SETTINGS, key


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


def test_every_guide_has_commands_and_is_linked() -> None:
    guides = [page for page in PAGES if page.startswith("recipes/guides/")]
    assert guides
    for guide in guides:
        assert f"({guide})" in README, guide
        assert guide in WITH_COMMANDS


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_another_block(page: str) -> None:
    assert {block.language for block in blocks(page)} <= {"bash", "python", "json", "text"}
    for block in blocks(page):
        assert block.language == "bash" or not re.search("^(midtune|pip) ", block.text, re.MULTILINE)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_tables_fit_a_terminal(page: str) -> None:
    assert [line for line in PAGES[page].splitlines() if line.startswith("|") and len(line) > 80] == []


def test_the_readme_is_a_page() -> None:
    assert len(README.splitlines()) <= 130


def test_the_defaults_it_names_are_the_defaults() -> None:
    tiny = load_config(None, {})
    assert (tiny.training.steps, tiny.task.eval_size, tiny.evaluation.baseline) == (100, 300, "measured")
    assert RunConfig().evaluation.baseline == "estimated"
