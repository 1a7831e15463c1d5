from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from midtune.cli import app
from midtune.config import BUNDLED_RECIPE, RunConfig, dump_config, load_config, require_task
from midtune.errors import InputError
from midtune.probe.selection import parse_layers, ranking_of, read_probe
from midtune.recipes import beside, recipe_file

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
RESULTS = sorted(ROOT.glob("recipes/results/*.json"))
COMMANDS = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", [*RECIPES, BUNDLED_RECIPE], ids=lambda path: path.stem)
def test_recipe_loads_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, {})
    require_task(config)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again, {}) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_is_the_command(recipe: Path) -> None:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# midtune ")
    words = shlex.split(first.removeprefix("# "))
    assert words[1] in COMMANDS
    assert words[2:] == ["--recipe", str(recipe.relative_to(ROOT))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_its_name_anywhere(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file(Path(recipe.stem)) == recipe_file(Path("recipes", recipe.name)) == recipe
    assert load_config(Path(recipe.stem), {}) == load_config(recipe, {})
    text = recipe.read_text(encoding="utf-8")
    assert ("Not run yet" in text) != ("\n# Measured: " in text)


def test_an_unknown_recipe_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(InputError, match="a name such as smollm2-math or "):
        recipe_file(Path("smollm2-mat"))
    with pytest.raises(InputError, match="a name that `midtune recipes` lists"):
        recipe_file(Path("x" * 5000))


def test_files_are_found_beside_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for name in ("task.py", "more.py", "here.py"):
        (there / name).touch()
    (tmp_path / "here.py").touch()
    monkeypatch.chdir(tmp_path)
    given = ["task.py", "more.py:best", "here.py", "gone.py", "math", 3]
    assert beside(given, there) == [f"{there}/task.py", f"{there}/more.py:best", *given[2:]]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_only_what_differs_or_matters(recipe: Path) -> None:
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert set(data) <= set(RunConfig.model_fields)
    assert data["model"]["name"]
    assert data["task"]["name"]


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*gsm8k.yaml")), ids=lambda path: path.stem)
def test_recipes_that_never_ran_say_so(recipe: Path) -> None:
    assert "Not run yet" in recipe.read_text(encoding="utf-8")
    training = load_config(recipe, {}).training
    assert (training.lr, training.group_size, training.beta, training.epsilon) == (5e-6, 4, 0.001, 0.2)


def test_gsm8k_answers_are_read_after_their_mark() -> None:
    from midtune.tasks.rewards import built_in

    reward = built_in("numeric")
    reference = "She has 3 * 4 = <<3*4=12>>12 apples, then eats 2.\n#### 10"
    scores = reward(
        prompts=["?"] * 3,
        completions=["3 * 4 = 12, less 2 is 10.\n#### 10", "#### 12", ""],
        completion_ids=[[1], [1], [1]],
        answer=[reference] * 3,
        question=["How many?"] * 3,
    )
    assert scores == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_that_of_its_recipe(result: Path) -> None:
    probe = read_probe(result)
    config = load_config(ROOT / f"recipes/{result.stem}.yaml", {})
    assert (probe["model"], probe["task"], probe["method"]) == (
        config.model.name,
        config.task.name,
        config.probe.method,
    )
    assert (probe["seed"], probe["seeds"]) == (config.seed, config.probe.seeds)
    training = config.training.model_dump()
    settings = {"full_lr": config.probe.full_lr, "samples": config.evaluation.samples, **training}
    assert {key: probe["settings"][key] for key in probe["settings"].keys() & settings.keys()} == {
        key: settings[key] for key in probe["settings"].keys() & settings.keys()
    }
    layers = config.probe.layers or f"0-{probe['num_blocks'] - 1}"
    assert sorted(ranking_of(probe)) == parse_layers(layers, probe["num_blocks"])


STUDY = sorted(ROOT.glob("recipes/study-*.yaml"))


@pytest.mark.parametrize("recipe", STUDY, ids=lambda path: path.stem)
def test_study_recipes_say_what_they_do_not_know(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert "Not run yet" in text and "arXiv 2607.01232" in text
    assert "ot stated" in text and "best block" in text
    training = load_config(recipe, {}).training
    # GiGPO's authors have another batch than the study has elsewhere.
    batch = 128 if training.algorithm == "gigpo" else 512
    assert training.prompts_per_step * training.group_size == batch


def test_study_recipes_have_the_best_blocks_of_the_study() -> None:
    found = {path.stem: load_config(path, {}) for path in STUDY}
    assert {stem.removeprefix("study-"): c.blocks.layers for stem, c in found.items()} == {
        "deepseek-r1-distill-qwen-7b-skywork": "16",
        "qwen2.5-1.5b-alfworld": "14",
        "qwen2.5-3b-alfworld": "18",
        "qwen2.5-math-1.5b-math": "14",
        "qwen3-1.7b-deepcoder": "10",
        "qwen3-1.7b-deepscaler": "10",
        "qwen3-1.7b-numinamath": "10",
        "qwen3-4b-numinamath": "16",
        "qwen3-8b-numinamath": "16",
    }


SINGLE_TURN = [path for path in STUDY if not path.stem.endswith("alfworld")]


@pytest.mark.parametrize(
    "recipe", [*SINGLE_TURN, *ROOT.glob("recipes/*gsm8k.yaml")], ids=lambda path: path.stem
)
def test_recipes_for_larger_models_read_the_hub(recipe: Path) -> None:
    from midtune.tasks.sources import hub_dataset

    task = load_config(recipe, {}).task
    assert task.name is not None and hub_dataset.is_dataset(task.name)
    assert task.template == "boxed" or task.system_prompt
    # Of so many rows some have no answer, or are in both parts.
    assert task.bad_rows == "drop"
