"""Problems and verifiers of reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

from midtune.errors import WHY, InputError, explained
from midtune.tasks.rewards import Reward, is_huge, per_completion
from midtune.tasks.split import Row, Sizes, Split, draw_split, problem, question_key

PREFIX = "reasoning-gym:"
# Arguments of a dataset that midtune sets, and the option that sets each.
_OURS = {"seed": "--seed", "size": "task.train_size and task.eval_size"}


def list_tasks() -> list[str]:
    """Names of reasoning-gym's datasets, sorted, without the prefix."""
    return sorted(_datasets())


def task_arguments(name: str) -> dict[str, Any]:
    """A reasoning-gym dataset's arguments and their defaults (None: no default); InputError if it does not exist."""
    known = _datasets()
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3) or sorted(known)[:3]
        raise InputError(
            f"reasoning-gym has no dataset `{name}`; the nearest names are {', '.join(near)}, "
            "and `midtune tasks` lists them all."
        )
    fields = dataclasses.fields(known[name][1])
    return {field.name: _default(field) for field in fields if field.name not in _OURS}


def draw_problems(name: str, args: Mapping[str, Any], sizes: Sizes) -> tuple[Split, Reward, dict[str, Any]]:
    """Problems of a dataset, its verifier and complete arguments; InputError for wrong ones or too few problems."""
    import reasoning_gym

    valid = task_arguments(name)
    defaults = ", ".join(f"{key} ({value!r})" for key, value in valid.items())
    listed = defaults if len(defaults) < 800 else ", ".join(valid)
    for key in args:
        if key in _OURS:
            raise InputError(
                f"`{key}` is not an argument of `{PREFIX}{name}` here; use {_OURS[key]} instead."
            )
        if key not in valid:
            raise InputError(f"`{PREFIX}{name}` has no argument `{key}`; it has {listed}.")
    # reasoning-gym seeds item i with seed + i, so neighbouring seeds would give the same problems.
    spread = int.from_bytes(hashlib.sha256(f"{name} {sizes.seed}".encode()).digest()[:4], "big") // 4
    no_problems = f"`{PREFIX}{name}` gives no problems with {dict(args) or 'its default arguments'}"
    latest: Any = None
    # The verifier reads metadata that no table column can hold, so it stays here, by question.
    entries: dict[str, Row] = {}

    def draw(start: int, stop: int) -> list[Row]:
        nonlocal latest
        # Their checks raise errors of any kind, even at the first problem.
        with explained(f"{no_problems}: {WHY}; change the arguments ({listed})."):
            latest = reasoning_gym.create_dataset(name, size=stop, seed=spread, **_typed(name, args))
            items = [latest[index] for index in range(start, stop)]
        rows = []
        for item in items:
            question, answer = item["question"], item["answer"]
            entries.setdefault(question_key(question), item)
            rows.append(problem(question, question, "" if answer is None else str(answer)))
        return rows

    split = draw_split(draw, sizes)

    def score_one(answer: str, reference: str, question: str) -> float:
        entry = entries.get(question_key(question))
        # Some verifiers evaluate what the model wrote.
        if entry is None or (is_huge(answer) and answer != reference):
            return 0.0
        # Verifiers warn about answers that they cannot read.
        with warnings.catch_warnings(action="ignore"):
            return float(latest.score_answer(answer=answer, entry=entry))

    arguments = json.loads(json.dumps(dataclasses.asdict(latest.config), default=_plain))
    complete = {key: value for key, value in arguments.items() if key not in _OURS}
    return split, per_completion("verifier", score_one), complete


def _typed(name: str, args: Mapping[str, Any]) -> Mapping[str, Any]:
    if name != "composite" or not isinstance(args.get("datasets"), list):
        return args
    from reasoning_gym.composite import DatasetSpec

    parts = [{"weight": 1.0, "config": {}, **part} for part in args["datasets"]]
    return {**args, "datasets": [DatasetSpec(**part) for part in parts]}


def _datasets() -> dict[str, tuple[type, Any]]:
    import reasoning_gym  # noqa: F401 (fills the registry)
    from reasoning_gym.factory import DATASETS

    return dict(DATASETS)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    """JSON for what a dataset's arguments hold besides plain values: sets, and classes or functions by name."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=json.dumps)
    return getattr(value, "__qualname__", type(value).__qualname__)
