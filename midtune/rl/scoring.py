"""Score held-out problems as a configuration says; a base model's scores are kept for later runs."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from midtune import processes
from midtune.config import RunConfig
from midtune.model.cache import cache_folder
from midtune.model.sources import Source
from midtune.rl.training import sampling_of
from midtune.rollout.evaluation import Evaluation, evaluate
from midtune.rollout.sampling import Sampler
from midtune.runs import sealed, unsealed
from midtune.tasks import Row, Task
from midtune.whole import sha256, write_bytes

# A description and a total → a display of the work, called with units done and their tokens.
Progress = Callable[[str, float], AbstractContextManager[Callable[..., None]]]


def score_rows(
    sampler: Sampler,
    rows: list[Row],
    task: Task,
    config: RunConfig,
    what: str,
    progress: Progress,
    *,
    samples: int | None = None,
    of_base: bool = False,
) -> Evaluation:
    """Score `rows` of the task greedily and by `samples` each, by default the configuration's; `what` is displayed.

    With `of_base` the policy is an untouched model: its scores are kept in midtune's cache, and taken from there. A
    reward or an environment of a person's own may depend on anything, so its scores are not kept.
    """
    samples = config.evaluation.samples if samples is None else samples
    kept = None
    # What weights are calibrated on depends on more than is scored here.
    plain = config.model.rounding == "nearest" or not sampler.policy.quantized
    if of_base and plain and not task.own_reward and task.game is None:
        kept = cache_folder("scores") / f"{_digest_of(sampler, rows, task, config, samples)}.json"
        if (known := processes.from_main(partial(_read, kept, len(rows), samples))) is not None:
            return known
    with progress(what, len(rows) * (1 + samples) / processes.count()) as advance:
        found = evaluate(
            sampler,
            rows,
            task.score,
            sampling_of(config.training),
            samples=samples,
            seed=config.seed,
            on_problems=lambda problems, tokens: advance(problems, tokens=tokens),
        )
    if kept is not None and processes.is_main():
        arrays = {"greedy": found.greedy.tolist(), "completions": found.completions}
        arrays["samples"] = None if found.samples is None else found.samples.tolist()
        # Without a cache, or with a score that is no number, they are computed again.
        with suppress(OSError, ValueError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(kept, json.dumps(sealed(arrays)).encode())
    return found


def _read(file: Path, problems: int, samples: int) -> Evaluation | None:
    """Kept scores; None if there are none, or they are damaged or of another shape."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        data = unsealed(file.read_bytes())
        greedy, completions = np.array(data["greedy"], float), [str(text) for text in data["completions"]]
        drawn = np.array(data["samples"], float) if samples else None
        shapes = greedy.shape, len(completions), None if drawn is None else drawn.shape
        if shapes == ((problems,), problems, (problems, samples) if samples else None):
            return Evaluation(
                greedy, None if drawn is None else drawn.mean(axis=1), completions, drawn, kept=True
            )
    return None


def _digest_of(sampler: Sampler, rows: list[Row], task: Task, config: RunConfig, samples: int) -> str:
    """Digest of all that decides a base model's scores."""
    policy = sampler.policy
    settings = config.model.model_dump(exclude={"name", "revision", "quantize", "device"})
    decides = [
        *(_code(), _contents(policy.source), settings),
        *(policy.computes, str(policy.model.dtype), policy.quantized),
        *(task.fingerprint, rows, config.sandbox.model_dump()),
        *(asdict(sampling_of(config.training)), config.training.graphs, samples, config.seed),
    ]
    text = json.dumps(decides, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def _code() -> list[str]:
    """midtune's own code, Python's version and that of every installed package."""
    seen = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        seen.update(file.read_bytes())
    packages = sorted(f"{package.name} {package.version}" for package in metadata.distributions())
    return [seen.hexdigest(), sys.version, *packages]


def _contents(source: Source) -> list[str]:
    """The model: its commit on the hub or version on the package index, or else the contents of its files."""
    if source.revision is not None:
        return [source.name, source.revision]
    return [f"{file.name} {sha256(file)}" for file in sorted(source.folder.iterdir()) if file.is_file()]
