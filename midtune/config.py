"""Every setting of a run and its default, once.

A recipe is a YAML file with the shape of `RunConfig`; any key can be set on the command line with
`--set part.key=value`. Precedence, lowest first: the defaults here, a recipe, command-line options.

Defaults of the training part are the settings of the study that midtune rests on (arXiv 2607.01232:
AdamW, group size 4, KL 0.001, clip 0.2) for a single block, except where a comment says that one consumer
card calls for something smaller, and for the learning rate: its 5e-6 is meant for batches of 512 completions.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from midtune.errors import InputError, bounded
from midtune.published import CARDS, find_card
from midtune.recipes import beside, recipe_file

BUNDLED_MODEL = "tiny"
BUNDLED_RECIPE = Path(__file__).parent / "assets" / BUNDLED_MODEL / "recipe.yaml"
# Planning defaults: the card, and tokens of the longest prompt.
PLANNED_CARD, PLANNED_PROMPT_TOKENS = "24GB", 512
# Problems held out by default.
MOST_HELD_OUT = 300
# Built-in rewards: those that judge an answer, and those that shape a completion regardless of it.
JUDGES = ("exact", "numeric", "math", "verifier", "code", "code-all")
SHAPING = ("format", "length", "repetition")
# Far beyond practical use: a larger value is a typo that would exhaust memory or time.
MOST_STEPS, MOST_PROBLEMS, MOST_TOKENS, MOST_COMPLETIONS = 1_000_000, 10_000_000, 1_000_000, 10_000
MOST_SEED = 2**32 - 1  # NumPy's limit
# Limits of a recipe: characters, and values with `*aliases` expanded.
_RECIPE_CHARACTERS, _RECIPE_VALUES = 1_000_000, 20_000
# Settings whose files may lie beside the recipe.
NAME_FILES = (("task", "name"), ("task", "eval_file"), ("task", "reward"), ("blocks", "probe"))
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
T = TypeVar("T")


def described(default: T, description: str, **limits: Any) -> T:
    """A setting: its default, what the help says of it, and between which limits it lies."""
    return Field(default, description=description, **limits)


def separated(value: Any) -> Any:
    """The list that a text with commas, or a single number, stands for."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int) else value


class Part(BaseModel):
    """A group of settings; unknown keys are errors."""

    # Validators are built on first use, since `--help` only reads the fields.
    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        defer_build=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        # File names and files can hold neither.
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise ValueError("must be text that UTF-8 can write, without the character NUL")
        return value


class ModelConfig(Part):
    """Which model, and how it is held in memory."""

    name: str = described(
        BUNDLED_MODEL, "hub id, folder, GGUF file, or `tiny` / `smollm2-135m` / `qwen2.5-coder-0.5b`"
    )
    revision: str | None = described(None, "branch, tag or commit of a hub model")
    quantize: Literal["nf4", "none"] = described("nf4", "how frozen linear layers are kept")
    rounding: Literal["nearest", "calibrated"] = described(
        "nearest",
        "in 4-bit, each weight's nearest value, or those with which layers give nearly the same on the task",
    )
    device: str = described("auto", "`auto`, `cpu`, `cuda` or `cuda:N`")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = described(
        "auto",
        "what activations are computed in; `auto`: bf16 on cards, fp16 on those without it, fp32 on CPUs",
    )
    adapter: Literal["full", "lora"] = described("full", "train whole blocks, or LoRA on them")
    lora_rank: int = described(16, "rank of the LoRA matrices", ge=1, le=65_536)
    experts: Literal["all", "frozen"] | None = described(
        None,
        "in mixtures of experts, train a block with its experts, or its router, attention and norms over frozen "
        "ones; default: all, unless they are stored in 4-bit",
    )
    unpack: Literal["auto", "never"] = described(
        "auto", "dequantize weights once a rollout where half the free memory holds them: faster"
    )
    embeddings: Literal["device", "host"] = described(
        "device",
        "where embeddings are kept; `host` keeps those that are not the head in RAM: saves GPU memory, costs one "
        "transfer per token",
    )
    trust_remote_code: bool = described(False, "run Python code that a model repository brings")


class TaskConfig(Part):
    """What to learn: prompts, answers and how completions are scored."""

    name: str | None = described(
        None,
        "`reasoning-gym:NAME`, `tiny-programs`, `frozen-lake`, `textworld`, `alfworld`, a jsonl, json, "
        "csv, tsv, parquet or arrow file, a folder of them, a hub dataset (`org/name` or `org/name:CONFIGURATION`), "
        "or a task file in Python",
    )
    args: dict[str, Any] = described({}, "parameters of a reasoning-gym dataset or a game")
    reward: list[str] | None = described(
        None,
        f"`{'`, `'.join(JUDGES)}`, or `path/to/file.py:function`; with others, and with "
        f"`{'`, `'.join(SHAPING[:-1])}` and `{SHAPING[-1]}`, which shape completions, added up by weights",
    )
    prompt_column: str | None = described(
        None,
        "column of the data that holds the prompt; default: prompt, question, problem, messages or conversations",
    )
    answer_column: str | None = described(
        None,
        "column of the data that holds the answer, `a.b` for the key b of objects in a; default: answer, "
        "solution, ground_truth or reward_model.ground_truth",
    )
    eval_file: str | None = described(None, "a file with the held-out problems")
    bad_rows: Literal["stop", "drop"] = described(
        "stop", "refuse rows that cannot be used, or leave them out"
    )
    last_turn: Literal["stop", "cut"] = described(
        "stop", "of a conversation that ends in the assistant's answer: refuse it, or leave that turn out"
    )
    max_prompt_tokens: int | None = described(
        None, "longest prompt; longer ones are bad rows; default: any", ge=1, le=MOST_TOKENS
    )
    template: Literal["none", "boxed", "r1", "question"] = described(
        "none",
        "how the question is put: step by step with a boxed answer, with <think> and <answer>, or as "
        "`Question: … Answer:`",
    )
    prompt_format: Literal["chat", "plain"] = described(
        "chat", "the model's chat template, or plain text that the model continues"
    )
    system_prompt: str | None = described(None, "system message put before every prompt")
    actions: Literal["text", "tools"] = described(
        "text", "in turns, a model acts by what it writes, or by calls of an environment's methods"
    )
    max_turns: int | None = described(
        None,
        "actions after which an episode ends, where the task is played in turns; default: 10, of alfworld 50",
        ge=1,
        le=MOST_COMPLETIONS,
    )
    turn_tokens: int | None = described(
        None,
        "most tokens of an action; default: what the episode has left of training.max_new_tokens",
        ge=1,
        le=MOST_TOKENS,
    )
    train_size: int = described(4000, "most training problems to keep", ge=1, le=MOST_PROBLEMS)
    eval_size: Annotated[int, Field(ge=2, le=MOST_PROBLEMS)] | Literal["auto"] = described(
        "auto",
        f"held-out problems, never shared with training; auto: {MOST_HELD_OUT}, of which `midtune train` scores as "
        "many as 15% of its run pay for",
    )

    @property
    def most_held_out(self) -> int:
        """How many problems are held out, if there are enough."""
        return MOST_HELD_OUT if self.eval_size == "auto" else self.eval_size

    @field_validator("reward", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class SandboxConfig(Part):
    """What a program that the model wrote may take, where the reward runs it."""

    cpu_s: int = described(3, "CPU seconds of each process", ge=1, le=86_400)
    wall_s: float = described(
        10.0, "seconds until a program, or all tests of its functions, end", gt=0, le=86_400
    )
    memory_mib: int = described(256, "address space of each process", ge=64, le=1_048_576)
    processes: int = described(4, "processes and threads", ge=1, le=1024)
    workers: int | None = described(None, "programs at a time; default: one per CPU", ge=1, le=1024)
    allow_weak: bool = described(False, "run programs without isolation where bubblewrap is missing")


class BlocksConfig(Part):
    """Which blocks to train."""

    layers: str | None = described(None, "`14`, `10-12`, `3,7`, or `middle`")
    top_k: int = described(1, "how many blocks to train", ge=1, le=1000)
    select: Literal["best", "middle", "worst", "boost"] = described(
        "best", "of a ranking the best, or as a control the worst; the middle; or all blocks, the best faster"
    )
    boost: float = described(
        2.0, "by `boost`: how many times the learning rate of the others the best blocks get", gt=0, le=1000
    )
    probe: Path | None = described(None, "a probe.json whose ranking chooses the blocks")


class TrainingConfig(Part):
    """The reinforcement learning itself."""

    algorithm: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo", "rloo", "gigpo"] = described(
        "grpo", "how advantages and the loss are formed; `gigpo` is for tasks that are played in turns"
    )
    gigpo_omega: float = described(1.0, "weight of GiGPO's turn-level advantages", ge=0, le=1000)
    gigpo_scale: bool = described(True, "divide GiGPO's differences from the mean by standard deviations")
    gigpo_gamma: float = described(0.95, "GiGPO's discount of later rewards", gt=0, le=1)
    steps: int = described(100, "optimizer steps", ge=1, le=MOST_STEPS)
    lr: Annotated[float, Field(gt=0, le=10)] | Literal["auto"] = described(
        "auto",
        "learning rate; auto: what moves the policy by a hundredth of its entropy a step",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = described(0, "steps over which the learning rate rises", ge=0, le=MOST_STEPS)
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)
    beta: float = described(0.001, "weight of the KL term against the original blocks", ge=0, le=1000)
    epsilon: float | None = described(
        None, "clip range of the probability ratio; default: the algorithm's own (GRPO 0.2)", gt=0, le=1000
    )
    prompts_per_step: int = described(
        8, "different prompts a step; the study: 128", ge=1, le=MOST_COMPLETIONS
    )
    prompts: Literal["uniform", "auto"] = described(
        "uniform",
        "train on each prompt in turn, or on those whose completions are likely to differ in reward",
    )
    group_size: int = described(4, "completions per prompt", le=MOST_COMPLETIONS)
    max_new_tokens: int = described(512, "longest completion; the study: 3,072", ge=1, le=MOST_TOKENS)
    temperature: float = described(1.0, "sampling temperature of training", gt=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = described(0, "sample among the k most likely tokens; 0: all", ge=0, le=MOST_TOKENS)
    min_p: float = described(
        0.0, "leave out tokens below this share of the likeliest one's probability", ge=0, le=1
    )
    stop_strings: list[Annotated[str, Field(min_length=1)]] = described([], "texts that end a completion")
    optimizer: Literal["adamw", "adamw_8bit"] = described(
        "adamw", "AdamW, or bitsandbytes' with 8-bit states: a quarter of their memory"
    )
    gradients: Literal["fp32", "bf16"] = described(
        "fp32", "of the trained blocks, from one micro-batch to the next: bf16 takes half the memory"
    )
    recompute: bool = described(
        False, "hold no activations in the update but compute them again: less memory, slower"
    )
    sampled_prompts: int = described(
        0,
        "most prompts whose completions are sampled together: less memory, slower; 0: all",
        ge=0,
        le=MOST_COMPLETIONS,
    )
    vllm: list[str] | None = described(
        None, "address of a vLLM server that samples in training, or `URL,URL,…` of several"
    )
    fit: str | None = described(
        "auto",
        "memory to stay within, such as 24GB: the fastest settings that fit are chosen; auto: what is free on the "
        "card, and no limit on a CPU; none: as configured",
    )
    graphs: Literal["auto", "never"] = described(
        "auto", "on a card, record a decode step once and replay it, or launch its kernels one by one"
    )
    micro_batch_tokens: int = described(16384, "most tokens in one backward pass", ge=1, le=100 * MOST_TOKENS)
    checkpoint_every: int = described(50, "steps between checkpoints", ge=1, le=MOST_STEPS)
    stop_after_equal_rewards: int = described(
        10, "stop when no group had unequal rewards for this many first steps; 0: never", ge=0, le=MOST_STEPS
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = described("none", "also log to a tracker")

    _addresses = field_validator("vllm", mode="before")(separated)

    @field_validator("fit")
    @classmethod
    def _fits_a_card(cls, text: str | None) -> str | None:
        if text not in (None, "auto", "none") and find_card(text) is None:
            raise ValueError(
                f"must be auto, none, memory, such as 24GB, or one of {', '.join(card.name for card in CARDS)}"
            )
        return text


class EvaluationConfig(Part):
    """Scoring on held-out problems, before and after."""

    samples: int = described(
        4, "completions per problem at the training temperature", ge=0, le=MOST_COMPLETIONS
    )
    k: list[Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)]] | None = described(
        None, "values of k for which `midtune eval` gives pass@k, such as `1,4`; at most `samples`"
    )
    deployed: bool = described(True, "also score on the unquantized model")
    baseline: Literal["measured", "estimated"] = described(
        "estimated", "full training's time and memory: run it for 2 steps, or estimate"
    )

    _counts = field_validator("k", mode="before")(separated)


# Removed probe settings, with the values that every earlier config.yaml holds.
RETIRED = {"objective": "gain", "prompts": 64}


class ProbeConfig(Part):
    """Ranking blocks."""

    method: Literal["race", "sweep"] = described(
        "race", "short runs raced against each other, or whole runs of every block and of all blocks"
    )
    budget: str = described("20m", "what a race may take: `90s`, `20m`, `2h` or `400 steps`")
    layers: str | None = described(None, "blocks to rank; default: all of them")
    seeds: int = described(1, "runs of each block in a sweep", ge=1, le=1000)
    full_lr: float | None = described(
        None, "learning rate of a sweep's full training; default: that of the blocks", gt=0, le=10
    )

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if (key, value) not in RETIRED.items()}
        return values

    @field_validator("budget")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_budget(text)
        return text


class RunConfig(Part):
    """A whole run; `config.yaml` in a run folder is one of these."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    blocks: BlocksConfig = Field(default_factory=BlocksConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    seed: int = described(0, "fixes problems, split, sampling and data order", ge=0, le=MOST_SEED)


@dataclass(frozen=True)
class Setting:
    """What this file says about one key: `choices` are its valid values if they are a closed list, `kind` its type."""

    description: str
    default: Any
    choices: tuple[str, ...]
    kind: Any


def _settings(part: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for name, field in part.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{prefix}{name}.")
            continue
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if isinstance(kind, UnionType):
            (kind,) = (one for one in get_args(kind) if one is not NoneType)
        default = field.get_default(call_default_factory=True)
        yield prefix + name, Setting(field.description or "", default, choices, str if choices else kind)


# By dotted key, such as `training.lr`.
SETTINGS = dict(_settings(RunConfig))
KEYS = tuple(SETTINGS)


def load_config(recipe: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration of a recipe (path or name; None: the defaults), with `overrides` (`training.lr`) applied.

    The bundled model's own recipe lies underneath where no recipe is given, or one that names no task.
    Naming another task drops the arguments that a recipe gives to its own.
    Raises InputError for a missing file, an unknown key (the nearest valid key is named) or a wrong type.
    """
    data = _read_recipe(recipe) if recipe is not None else {}
    parts = {key: part for key, part in data.items() if isinstance(part, dict)}
    model = overrides.get("model.name", parts.get("model", {}).get("name") or BUNDLED_MODEL)
    if model == BUNDLED_MODEL and parts.get("task", {}).get("name") is None:
        base = _read_recipe(BUNDLED_RECIPE)
        both = {key: base[key] | part for key, part in parts.items() if isinstance(base.get(key), dict)}
        data = base | data | both  # the arguments of a task are one value
    task = data.get("task")
    if isinstance(task, dict) and overrides.get("task.name", task.get("name")) != task.get("name"):
        data["task"] = {key: value for key, value in task.items() if key != "args"}
    for key, value in overrides.items():
        _put(data, key, value)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, recipe, overrides)) from None
    if config.training.group_size < 2:
        raise InputError(
            f"group size {config.training.group_size} was asked for, but advantages compare completions of "
            "one prompt, so it must be at least 2; use --group-size 4 or more."
        )
    if config.evaluation.k and max(config.evaluation.k) > config.evaluation.samples:
        raise InputError(
            f"pass@{max(config.evaluation.k)} was asked for, but {config.evaluation.samples} samples are drawn for "
            f"each problem; use --samples {max(config.evaluation.k)} or more."
        )
    return config


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with some keys (`training.lr`) changed."""
    data = config.model_dump()
    for key, value in settings.items():
        _put(data, key, value)
    return RunConfig.model_validate(data)


def parse_budget(text: str) -> tuple[float, Literal["seconds", "steps"]]:
    """`90s`, `20m` and `2h` as seconds, `400 steps` as steps; raises ValueError if it is none of these."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|steps?)\s*", text)
    amount = float(match[1]) if match is not None else 0.0
    if match is None or amount <= 0:
        raise ValueError(
            "must be a time such as `90s`, `20m` or `2h`, or a number of steps such as `400 steps`"
        )
    if amount > MOST_STEPS:
        raise ValueError(f"must be at most {MOST_STEPS:,} of its unit")
    seconds = {"s": 1, "m": 60, "h": 3600}.get(match[2])
    return (amount, "steps") if seconds is None else (amount * seconds, "seconds")


def require_task(config: RunConfig) -> str:
    """The name of the task; raises InputError, which says what a task can be, if there is none."""
    if config.task.name is None:
        raise InputError(
            f"no task was given for {config.model.name}; add --task reasoning-gym:NAME (`midtune tasks` has "
            "the names), or --task with a data file, a hub dataset or a task file."
        )
    return config.task.name


def parse_assignment(text: str, option: str = "--set part.key=value") -> tuple[str, Any]:
    """`training.lr=1e-5` → `("training.lr", 1e-5)`; the value is read as YAML unless the key holds text.

    Raises InputError, which names `option` and the form it asks for, if no key or no `=` was typed.
    """
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise InputError(f"`{option.split()[0]} {text}` sets nothing; write it as `{option}`.")
    known = SETTINGS.get(key)
    as_text = known is not None and known.kind in (str, Path) and value.strip() not in ("", "null", "~")
    return key, value.strip() if as_text else parse_value(value)


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it, with `1e-5` a number (YAML 1.1 wants `1.0e-5`)."""
    try:
        value = _load_yaml(text)
    except ValueError:
        return text
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and math.isfinite(float(value)):
            return float(value)
    return value


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_recipe(given: Path) -> dict[str, Any]:
    path = recipe_file(given)
    try:
        with path.open(encoding="utf-8") as file:
            data = _load_yaml(file.read(_RECIPE_CHARACTERS + 1))
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is not text; give the path of a YAML file.") from None
    except ValueError as error:
        where = f" ({error})" if str(error) else ""
        raise InputError(f"recipe {path} is not valid YAML{bounded(where, 200)}; fix it.") from None
    if not isinstance(data, dict):
        raise InputError(f"recipe {path} holds no settings; it needs keys such as `model:` and `training:`.")
    # A heading whose keys are all commented out has the value None.
    data = {str(key): value for key, value in data.items() if value is not None}
    for part, key in NAME_FILES:
        if isinstance(data.get(part), dict) and key in data[part]:
            data[part] = data[part] | {key: beside(data[part][key], path.parent)}
    return data


def _load_yaml(text: str) -> Any:
    """What a YAML text says; a ValueError where it is not valid, nests too deep, or its aliases stand for too much."""
    import yaml

    if len(text) > _RECIPE_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and {_RECIPE_CHARACTERS:,} are read")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_of(node, {}) > _RECIPE_VALUES:
            raise ValueError(f"its aliases stand for more than {_RECIPE_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        raise ValueError(f"line {mark.line + 1}" if mark else "") from None
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Constructors raise these, for an impossible date or a number with thousands of digits.
        raise ValueError(str(error)) from None


def _values_of(node: Any, known: dict[int, float]) -> float:
    """How many values a node of YAML stands for; endless where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        children = node.value if isinstance(node.value, list) else []
        inner = [part for child in children for part in (child if isinstance(child, tuple) else [child])]
        known[id(node)] = 1 + sum(_values_of(part, known) for part in inner)
    return known[id(node)]


def _put(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, parent in enumerate(parents, 1):
        known = SETTINGS.get(".".join(parents[:depth]))
        existing = data.get(parent, {})
        if known is not None and get_origin(known.kind) is not dict:
            existing = {}  # a setting with one value was given a key: validation reports it
        elif not isinstance(existing, dict):
            return  # the existing value is wrong already: validation reports it
        data[parent] = dict(existing)
        data = data[parent]
    data[last] = value


def _explain(error: ValidationError, recipe: Path | None, overrides: Mapping[str, Any]) -> str:
    # Where a value may be one of several types, each says what it must be.
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    if (parent := key.rpartition(".")[0]) in SETTINGS and isinstance(first["loc"][-1], str):
        key = parent
    typed = recipe is None or any(name == key or name.startswith(f"{key}.") for name in overrides)
    source = "on the command line" if typed else f"in recipe {recipe}"
    value = first["input"]
    if isinstance(value, dict) and key in SETTINGS and first["type"] != "extra_forbidden":
        inner = f"{key}.{next(iter(value), '')}"
        return f"unknown key `{inner}` {source}; `{key}` is one value and has no keys of its own."
    if first["type"] == "extra_forbidden":
        return f"unknown key `{bounded(key, 200)}` {source}; the nearest valid key is `{_nearest(key)}`."
    if first["type"] in ("model_type", "model_attributes_type"):
        return (
            f"`{key}` {source} was given {bounded(repr(value), 200)}, but it is a group of settings; "
            f"set one of {', '.join(f'`{name}`' for name in KEYS if name.startswith(f'{key}.'))}."
        )
    same = [first, *(other for other in others if key == parent and other["loc"][:-1] == first["loc"][:-1])]
    message = " or ".join(_asked_for(one["msg"]) for one in same).replace(" or must be ", " or ")
    return f"`{bounded(key, 200)}` {source} was {bounded(repr(value), 200)}, but it {message}; change it."


def _asked_for(message: str) -> str:
    message = message.removeprefix("Input ").removeprefix("Value error, ").replace("should", "must")
    return message.partition(", unable to parse")[0]


def _nearest(key: str) -> str:
    key = key[:100]  # longer keys match nothing and are slow to compare
    parts = [*dict.fromkeys(k.split(".")[0] for k in KEYS), *KEYS]
    last = key.rpartition(".")[2]
    by_last = {k.rpartition(".")[2]: k for k in reversed(KEYS)}
    if last not in by_last and (close := difflib.get_close_matches(key, parts, n=1)):
        return close[0]
    return by_last[difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.0)[0]]
