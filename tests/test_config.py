from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midtune.config import (
    SETTINGS,
    RunConfig,
    dump_config,
    load_config,
    parse_assignment,
    parse_value,
    require_task,
)
from midtune.errors import InputError


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def message(recipe: Path | None, **overrides: object) -> str:
    with pytest.raises(InputError) as caught:
        load_config(recipe, {key.replace("__", "."): value for key, value in overrides.items()})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_given_means_the_bundled_model_and_its_recipe() -> None:
    config = load_config(None, {})
    assert config.model.name == "tiny"
    assert config.task.name == "reasoning-gym:chain_sum"
    assert (config.training.lr, config.training.max_new_tokens) == (2e-3, 40)
    assert config.training.temperature == RunConfig().training.temperature


def test_command_line_beats_recipe_beats_default(tmp_path: Path) -> None:
    recipe = write(tmp_path, "training: {steps: 3, lr: 1e-4}\ntask: {name: a.jsonl}\n")
    config = load_config(recipe, {"training.steps": 5})
    assert (config.training.steps, config.training.lr, config.training.group_size) == (5, 1e-4, 4)


def test_another_model_gets_nothing_of_the_bundled_recipe() -> None:
    config = load_config(None, {"model.name": "smollm2-135m"})
    assert config.task.name is None
    assert config.training == RunConfig().training
    with pytest.raises(InputError, match=r"smollm2-135m.*reasoning-gym:NAME.*data file"):
        require_task(config)


def test_a_recipe_with_a_task_stands_alone(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "task: {name: a.jsonl}\n"), {})
    assert config.task.args == {}
    assert config.training == RunConfig().training


def test_a_recipe_without_a_task_lies_over_the_bundled_one(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "training: {lr: 1e-3}\n"), {})
    assert config.task.name == "reasoning-gym:chain_sum"
    assert (config.training.lr, config.training.max_new_tokens) == (1e-3, 40)


def test_another_task_drops_the_arguments_of_the_first(tmp_path: Path) -> None:
    assert load_config(None, {"task.name": "reasoning-gym:gcd"}).task.args == {}
    kept = load_config(None, {"task.name": "reasoning-gym:chain_sum", "task.args.max_terms": 3})
    assert kept.task.args == {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2}
    recipe = write(tmp_path, "task: {name: 'reasoning-gym:gcd', args: {max_value: 9}}\n")
    other = load_config(recipe, {"task.name": "reasoning-gym:lcm", "task.args.min_value": 2})
    assert other.task.args == {"min_value": 2}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.stps", "training.steps"),
        ("training.top_kk", "training.top_k"),
        ("traning.lr", "training"),
        ("lr", "training.lr"),
        ("group_sise", "training.group_size"),
        ("trainin", "training"),
        ("model.quantise", "model.quantize"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert f"`{nearest}`" in message(None, **{key: 1})


def test_unknown_key_says_where_it_stands(tmp_path: Path) -> None:
    recipe = write(tmp_path, "task: {name: a.jsonl}\ntraining: {stps: 3}\n")
    assert f"unknown key `training.stps` in recipe {recipe}" in message(recipe)
    assert "on the command line" in message(None, training__stps=3)
    good = write(tmp_path, "task: {name: a.jsonl}\n")
    assert "on the command line" in message(good, training__stps=3)


def test_wrong_types_say_what_is_valid(tmp_path: Path) -> None:
    assert "'grpo', 'dr_grpo'" in message(None, training__algorithm="ppo")
    assert "`training.steps` on the command line was 'many', but it must be a valid integer" in message(
        None, training__steps="many"
    )
    assert "finite number" in message(None, training__lr=float("inf"))
    assert "'fast', but it must be a valid number or 'auto'; change it" in message(None, training__lr="fast")
    assert "must be greater than 0 or 'auto'" in message(None, training__lr=-1)
    assert "greater than or equal to 1" in message(None, training__steps=0)
    assert "at least 2" in message(None, training__group_size=1)
    assert "`training.lr` is one value" in message(None, training__lr__start=1)
    other = write(tmp_path, "task: {name: a.jsonl}\n")
    assert "`training.lr` is one value" in message(other, training__lr__start=1)


def test_a_group_given_one_value_lists_its_keys(tmp_path: Path) -> None:
    text = message(None, model="tiny")
    assert "`model` on the command line was given 'tiny'" in text
    assert "`model.name`" in text
    assert "group of settings" in message(None, model="tiny", model__quantize="none")
    assert "group of settings" in message(write(tmp_path, "training: 5\n"))


def test_missing_recipe(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "none.yaml")


def test_a_heading_with_nothing_under_it_is_no_error(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "training:\nmodel: {name: x}\n"), {}).model.name == "x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.lr=1e-5", ("training.lr", 1e-5)),
        ("training.lr=auto", ("training.lr", "auto")),
        ("training.steps=3", ("training.steps", 3)),
        ("blocks.layers=14", ("blocks.layers", "14")),
        ("model.revision=0123456", ("model.revision", "0123456")),
        ("model.revision=12e4567", ("model.revision", "12e4567")),
        ("training.epsilon=null", ("training.epsilon", None)),
        ("task.args.operators=[+, -]", ("task.args.operators", ["+", "-"])),
        ("task.system_prompt=a=b: c", ("task.system_prompt", "a=b: c")),
    ],
)
def test_assignments(text: str, expected: tuple[str, object]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["training.lr", "=3", " =3"])
def test_assignment_without_a_key_or_value(text: str) -> None:
    with pytest.raises(InputError, match="--set part.key=value"):
        parse_assignment(text)


def test_numbers_as_people_write_them() -> None:
    assert parse_value("1e-5") == 1e-5
    assert parse_value("nan") == "nan"
    assert parse_value("inf") == "inf"
    assert parse_value("true") is True


def test_settings_come_from_the_fields() -> None:
    algorithm = SETTINGS.get("training.algorithm")
    assert algorithm is not None and algorithm.choices[:2] == ("grpo", "dr_grpo") and algorithm.kind is str
    steps = SETTINGS.get("training.steps")
    assert steps is not None and steps.default == 100 and steps.kind is int
    assert SETTINGS.get("training") is None
    assert SETTINGS.get("training.nothing") is None
    assert SETTINGS.get("training.lr.more") is None
    assert SETTINGS.get("task.args.min_terms") is None


@given(
    lr=st.floats(1e-12, 10),
    steps=st.integers(1, 10**6),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    args=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
        st.one_of(
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.lists(st.integers()),
        ),
    ),
    layers=st.sampled_from([None, "14", "10-12", "3,7", "middle"]),
    probe=st.sampled_from([None, Path("runs/a b/probe.json")]),
)
def test_what_is_dumped_loads_to_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    lr: float,
    steps: int,
    name: str,
    args: dict[str, object],
    layers: str | None,
    probe: Path | None,
) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"name": name},
            "task": {"name": name, "args": args},
            "blocks": {"layers": layers, "probe": probe},
            "training": {"lr": lr, "steps": steps},
        }
    )
    recipe = tmp_path_factory.getbasetemp() / "dumped.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    assert load_config(recipe, {}) == config


def test_the_resolved_bundled_run_is_dumped_whole(tmp_path: Path) -> None:
    config = load_config(None, {"task.name": "reasoning-gym:gcd"})
    assert load_config(write(tmp_path, dump_config(config)), {}) == config


def test_the_settings_of_earlier_runs_are_read(tmp_path: Path) -> None:
    recipe = tmp_path / "config.yaml"
    recipe.write_text("probe: {method: race, objective: gain, prompts: 64}")
    assert load_config(recipe, {}) == load_config(None, {})
    recipe.write_text("probe: {objective: gain-per-second}")
    with pytest.raises(InputError, match=r"unknown key `probe.objective` in recipe"):
        load_config(recipe, {})


def test_memory_to_stay_within_is_read_with_the_configuration() -> None:
    assert load_config(None, {"training.fit": "a100 80gb"}).training.fit == "a100 80gb"
    # As earlier runs have it.
    assert load_config(None, {"training.fit": None}).training.fit is None
    with pytest.raises(
        InputError,
        match="`training.fit` on the command line was '24XB', but it must be auto, none, memory, such",
    ):
        load_config(None, {"training.fit": "24XB"})


# Nine lists of nine aliases each: 336 bytes, 3.5e9 values.
ALIASES = "task:\n  args:\n    a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"    {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIASES, "its aliases stand for more than 20,000 values"),
        ("task: &t\n  args: {a: *t}\n", "its aliases stand for more than 20,000 values"),
        ("task: " + "[" * 5000 + "]" * 5000, "it nests too deep"),
        ("seed: 2001-99-99\n", "must be in 1..12"),
        ("seed: " + "9" * 5000 + "\n", "Exceeds the limit"),
        ("{[a]: 1}: 2\n", "not valid YAML"),
        ("# " + "x" * 1_000_000, "1,000,000 are read"),
        ("model: [\n", "not valid YAML (line 2)"),
        ("- a\n- b\n", "holds no settings"),
        ("", "holds no settings"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, text: str, words: str) -> None:
    said = message(write(tmp_path, text))
    assert words in said
    assert len(said) < 600


def test_aliases_of_ordinary_recipes_are_read(tmp_path: Path) -> None:
    recipe = write(tmp_path, "model: &m {name: tiny}\nblocks: {layers: &n '3'}\nprobe: {layers: *n}\n")
    assert load_config(recipe, {}).probe.layers == "3"


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("training.steps", 10**6 + 1, "1000000"),
        ("task.eval_size", 10**30, "10000000 or 'auto'"),
        ("seed", 2**32, "4294967295"),
        ("training.group_size", 10**5, "10000"),
        ("training.max_new_tokens", 10**9, "1000000"),
    ],
)
def test_numbers_have_upper_bounds_that_are_said(key: str, value: int, most: str) -> None:
    assert message(None, **{key.replace(".", "__"): value}).endswith(
        f"was {value}, but it must be less than or equal to {most}; change it."
    )


def test_values_of_any_length_are_shown_in_part() -> None:
    said = message(None, model__device=["x" * 10**6])
    assert "characters left out)" in said
    assert len(said) < 500


@pytest.mark.parametrize("name", ["a\0b", "a\udcffb"])
def test_text_that_no_file_can_hold_is_refused(name: str) -> None:
    assert "must be text that UTF-8 can write" in message(None, model__name=name)
