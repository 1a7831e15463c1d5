"""Problems and verifiers of reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from midtune.errors import InputError
from midtune.tasks.rewards import Reward, is_huge, per_completion
from midtune.tasks.split import Row, Split, draw_split, question_key

PREFIX = "reasoning-gym:"
_OURS = ("seed", "size")


def list_tasks() -> list[str]:
    """The names of reasoning-gym's datasets, in alphabetical order, without the prefix."""
    return sorted(_datasets())


def task_arguments(name: str) -> dict[str, Any]:
    """The arguments of a reasoning-gym dataset and their defaults (None: no default).

    Raises:
        InputError: there is no such dataset.
    """
    config = _config_class(name)
    return {field.name: _default(field) for field in dataclasses.fields(config) if field.name not in _OURS}


def draw_problems(
    name: str, args: Mapping[str, Any], *, train_size: int, eval_size: int, seed: int
) -> tuple[Split, Reward, dict[str, Any]]:
    """Problems of a reasoning-gym dataset, its verifier as a reward, and its complete arguments.

    Args:
        name: the dataset, without prefix.
        args: arguments of the dataset.
        train_size: training problems wanted.
        eval_size: held-out problems wanted.
        seed: fixes the problems and which of them are held out.

    Raises:
        InputError: there is no such dataset, an argument is wrong, or it has too few different problems.
    """
    arguments = dict(args)
    start_seed = _spread(name, seed)
    latest: list[Any] = []

    def draw(start: int, stop: int) -> list[Row]:
        dataset, items = _generate(name, arguments, start_seed, stop, start, stop)
        latest[:] = [dataset]
        return items

    split = draw_split(draw, train_size=train_size, eval_size=eval_size, seed=seed)
    kept = [*split.train, *split.held_out]
    # The verifier reads metadata that no table column can hold, so it stays here, by question.
    entries = {question_key(item["question"]): item for item in kept}
    complete = _plain(dataclasses.asdict(latest[0].config))
    for key in _OURS:
        complete.pop(key, None)
    return split, _verifier(latest[0].score_answer, entries), complete


def _verifier(score_answer: Callable[..., Any], entries: Mapping[str, Row]) -> Reward:
    def score_one(answer: str, reference: str, question: str) -> float:
        entry = entries.get(question_key(question))
        # Some verifiers evaluate what the model wrote.
        if entry is None or (is_huge(answer) and answer != reference):
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # verifiers warn about answers that they cannot read
            return float(score_answer(answer=answer, entry=entry))

    return per_completion("verifier", score_one)


def _generate(
    name: str, args: dict[str, Any], seed: int, size: int, start: int, stop: int
) -> tuple[Any, list[Row]]:
    import reasoning_gym

    _check_arguments(name, args)
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **_typed(name, args))
        return dataset, [dataset[index] for index in range(start, stop)]
    except Exception as error:  # noqa: BLE001 (their checks raise errors of any kind, even at the first problem)
        reason = str(error) or type(error).__name__
        raise InputError(
            f"`{PREFIX}{name}` gives no problems with {args or 'its default arguments'}: {reason}; "
            f"change the arguments ({_listed(name)})."
        ) from None


def _check_arguments(name: str, args: Mapping[str, Any]) -> None:
    valid = task_arguments(name)
    for key in args:
        if key in _OURS:
            own = "--seed" if key == "seed" else "task.train_size and task.eval_size"
            raise InputError(f"`{key}` is not an argument of `{PREFIX}{name}` here; use {own} instead.")
        if key not in valid:
            raise InputError(f"`{PREFIX}{name}` has no argument `{key}`; it has {_listed(name)}.")


def _typed(name: str, args: dict[str, Any]) -> dict[str, Any]:
    if name != "composite" or not isinstance(args.get("datasets"), list):
        return args
    from reasoning_gym.composite import DatasetSpec

    parts = [{"weight": 1.0, "config": {}, **part} for part in args["datasets"]]
    return {**args, "datasets": [DatasetSpec(**part) for part in parts]}


def _listed(name: str) -> str:
    valid = ", ".join(f"{key} ({value!r})" for key, value in task_arguments(name).items())
    return valid if len(valid) < 800 else ", ".join(task_arguments(name))


def _datasets() -> dict[str, tuple[type, type]]:
    import reasoning_gym  # noqa: F401 (fills the registry)
    from reasoning_gym.factory import DATASETS

    found: dict[str, tuple[type, type]] = DATASETS
    return found


def _config_class(name: str) -> Any:
    known = _datasets()
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3) or sorted(known)[:3]
        raise InputError(
            f"reasoning-gym has no dataset `{name}`; the nearest names are {', '.join(near)}, "
            "and `midtune tasks` lists them all."
        )
    return known[name][1]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _spread(name: str, seed: int) -> int:
    # reasoning-gym seeds item i with seed + i, so neighbouring seeds would give the same problems.
    return int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:4], "big") // 4


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=lambda item: json.dumps(item))
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
