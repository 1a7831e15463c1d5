"""Every setting of a run and its default, once.

A recipe is a YAML file with the shape of `RunConfig`; any key can be set on the command line with
`--set part.key=value`. Precedence, lowest first: the defaults here, a recipe, command-line options.

Defaults of the training part are the settings of the study that midtune rests on (arXiv 2607.01232:
AdamW, learning rate 5e-6, group size 4, KL 0.001, clip 0.2) for a single block, except where a
comment says that one consumer card calls for something smaller.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from midtune.errors import InputError

BUNDLED_MODEL = "tiny"


class Part(BaseModel):
    """A group of settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class ModelConfig(Part):
    """Which model, and how it is held in memory."""

    name: str = Field(BUNDLED_MODEL, description="hub id, folder, GGUF file, or `tiny` / `smollm2-135m`")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    quantize: Literal["nf4", "none"] = Field("nf4", description="how frozen linear layers are kept")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    adapter: Literal["full", "lora"] = Field("full", description="train whole blocks, or LoRA on them")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    trust_remote_code: bool = Field(False, description="run Python code that a model repository brings")


class TaskConfig(Part):
    """What to learn: prompts, answers and how completions are scored."""

    name: str | None = Field(None, description="`reasoning-gym:NAME`, or a jsonl or csv file")
    args: dict[str, Any] = Field(default_factory=dict, description="parameters of a reasoning-gym dataset")
    reward: str | None = Field(
        None, description="`exact`, `numeric`, `math`, `verifier`, or `path/to/file.py:function`"
    )
    prompt_column: str = Field("prompt", description="column of a data file that holds the prompt")
    answer_column: str = Field("answer", description="column of a data file that holds the answer")
    system_prompt: str | None = Field(None, description="system message put before every prompt")
    train_size: int = Field(4000, ge=1, description="most training problems to keep")
    eval_size: int = Field(300, ge=2, description="held-out problems, never shared with training")


class BlocksConfig(Part):
    """Which blocks to train."""

    layers: str | None = Field(None, description="`14`, `10-12`, `3,7`, or `middle`")
    top_k: int = Field(1, ge=1, description="how many blocks to train")
    probe: Path | None = Field(None, description="a probe.json whose ranking chooses the blocks")


class TrainingConfig(Part):
    """The reinforcement learning itself."""

    algorithm: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"] = "grpo"
    steps: int = Field(100, ge=1, description="optimizer steps")
    lr: float = Field(5e-6, gt=0, description="learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    beta: float = Field(0.001, ge=0, description="weight of the KL term against the original blocks")
    epsilon: float | None = Field(
        None, gt=0, description="clip range of the probability ratio; default: the algorithm's own (GRPO 0.2)"
    )
    prompts_per_step: int = Field(8, ge=1, description="different prompts a step; the study: 128")
    group_size: int = Field(4, description="completions per prompt")
    max_new_tokens: int = Field(512, ge=1, description="longest completion; the study: 3,072")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="sample among the k most likely tokens; 0: all")
    micro_batch_tokens: int = Field(16384, ge=1, description="most tokens in one backward pass")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    stop_after_equal_rewards: int = Field(
        10, ge=0, description="stop when no group had unequal rewards for this many first steps; 0: never"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


class EvaluationConfig(Part):
    """Scoring on held-out problems, before and after."""

    samples: int = Field(4, ge=0, description="completions per problem at the training temperature")
    deployed: bool = Field(True, description="also score on the unquantized model")
    baseline: Literal["measured", "estimated"] = Field(
        "estimated", description="full training's time and memory: run it for 2 steps, or estimate"
    )


class ProbeConfig(Part):
    """Ranking blocks."""

    method: Literal["gradient", "trial"] = "gradient"
    layers: str | None = Field(None, description="blocks to rank; default: all of them")
    prompts: int = Field(64, ge=4, description="prompts for the gradient method")
    trial_steps: int = Field(20, ge=1, description="steps of each single-block trial")


class RunConfig(Part):
    """A whole run; `config.yaml` in a run folder is one of these."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    blocks: BlocksConfig = Field(default_factory=BlocksConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    seed: int = Field(0, ge=0)


def load_config(recipe: Path | None, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a recipe with `overrides` applied.

    Args:
        recipe: a YAML file with the shape of `RunConfig`, or None for the defaults.
        overrides: dotted key (`training.lr`) → value; values of None are ignored.

    Raises:
        InputError: no such file, an unknown key (the nearest valid key is named) or a wrong type.
    """
    data = _read_recipe(recipe) if recipe is not None else {}
    for key, value in overrides.items():
        if value is not None:
            _put(data, key, value)
    source = str(recipe) if recipe is not None else "the command line"
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, source)) from None
    if config.training.group_size < 2:
        raise InputError(
            f"group size {config.training.group_size} was asked for, but advantages compare completions of "
            "one prompt, so it must be at least 2; use --group-size 4 or more."
        )
    return config


def parse_assignment(text: str) -> tuple[str, Any]:
    """`training.lr=1e-5` → `("training.lr", 1e-5)`; the value is read as YAML.

    Raises:
        InputError: there is no `=` in `text`.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"`--set {text}` has no value; write it as `--set part.key=value`.")
    return key.strip(), parse_value(value)


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it, with `1e-5` a number (YAML 1.1 wants `1.0e-5`)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value) if value.strip().lower() not in {"nan", "inf", "-inf", "infinity"} else value
        except ValueError:
            return value
    return value


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"recipe {path} does not exist; give the path of a YAML file.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else "?"
        raise InputError(f"recipe {path} is not valid YAML (line {line}); mend that line.") from None
    if not isinstance(data, dict):
        raise InputError(f"recipe {path} holds no settings; it needs keys such as `model:` and `training:`.")
    return data


def _put(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        existing = data.get(parent)
        data[parent] = dict(existing) if isinstance(existing, dict) else {}
        data = data[parent]
    data[last] = value


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found += _keys(annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _explain(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = _nearest(key)
        return f"unknown key `{key}` in {source}; the nearest valid key is `{near}`."
    message = first["msg"].removeprefix("Input ").replace("should", "must")
    return f"`{key}` in {source} was {first['input']!r}, but it {message}; change it."


def _nearest(key: str) -> str:
    keys = _keys(RunConfig)
    parts = [*dict.fromkeys(k.split(".")[0] for k in keys), *keys]
    close = difflib.get_close_matches(key, parts, n=1, cutoff=0.5)
    if close:
        return close[0]
    last = key.rsplit(".", 1)[-1]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    close = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.0)
    return by_last[close[0]]
