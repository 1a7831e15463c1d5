"""midtune in a notebook or a script: `midtune.train`, `midtune.probe` and `midtune.load`.

They do what the commands of their names do, with the same settings, files and errors (`midtune.errors.InputError`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    recipe: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train blocks as `midtune train` does; returns report.json, with the run's folder as `run`.

    `recipe` is a file, or a name that `midtune recipes` lists (None: the bundled model and its task). `settings` are
    keys of a recipe, such as `{"training.steps": 50}`, which override it. `out` is the run's folder, by default a new
    one under `runs/`.
    """
    return _run("train", recipe, settings, out, quiet)


def probe(
    recipe: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Rank the blocks as `midtune probe` does; returns probe.json. Arguments are those of `train`."""
    return _run("probe", recipe, settings, out, quiet)


def load(
    run: str | Path, *, quantize: str = "none", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of a run or patch folder with the trained blocks in place, and its tokenizer.

    `quantize="nf4"` gives the model as it was trained, in 4-bit; by default it is unquantized. The model is frozen, in
    evaluation mode, and in the dtype that suits the device (`auto`: a card if there is one).
    """
    from midtune.config import load_config, with_settings
    from midtune.model.patch import apply_patch, read_patch, require_patch
    from midtune.report.terminal import Terminal
    from midtune.stages.opening import Opened

    folder = require_patch(str(run))
    patch = read_patch(folder)
    recipe = folder.parent / "config.yaml"
    model = {"name": patch.base_model, "revision": patch.revision, "device": device, "dtype": "auto"}
    given = {f"model.{key}": value for key, value in model.items()}
    config = with_settings(load_config(recipe if recipe.is_file() else None, {}), given)
    policy = Opened(config, Terminal(quiet=True)).policy(quantize=quantize, embeddings="device")
    apply_patch(policy, folder)
    if policy.adapter is not None and not policy.quantized:
        policy.adapter.merge_and_unload()
    # Without midtune's autocast, all blocks have to compute in one dtype.
    for parameter in policy.trained_parameters().values():
        parameter.data = parameter.data.to(policy.compute_dtype)
    return policy.model.eval().requires_grad_(False), policy.tokenizer


def _run(
    stage: str, recipe: Any, settings: Mapping[str, Any] | None, out: Any, quiet: bool
) -> dict[str, Any]:
    from midtune.config import load_config, require_task
    from midtune.report.terminal import Terminal

    config = load_config(None if recipe is None else Path(recipe), settings or {})
    require_task(config)
    run = import_module(f"midtune.stages.{stage}").run
    found: dict[str, Any] = run(
        config, out=None if out is None else Path(out), resume=None, terminal=Terminal(quiet=quiet)
    )
    return found
