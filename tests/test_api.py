"""`midtune.train`, `midtune.probe` and `midtune.load`, as a notebook calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import midtune
from midtune.config import dump_config
from midtune.errors import InputError
from midtune.model.loading import load_policy
from midtune.model.patch import apply_patch
from midtune.model.sources import resolve
from midtune.stages import train as stage
from tests.stages.conftest import small_run


def test_importing_it_takes_nothing_heavy() -> None:
    code = "import sys, midtune; assert callable(midtune.probe); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "numpy", "pydantic"} & set(found.stdout.split())


def test_functions_are_found_and_nothing_else() -> None:
    import midtune.probe.selection  # noqa: F401 (from now on `midtune.probe` is the package)

    assert all(callable(getattr(midtune, name)) for name in ("train", "probe", "load"))
    with pytest.raises(AttributeError, match="has no attribute 'tune'"):
        midtune.tune  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_is_trained_and_loaded(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> None:
    (tmp_path / "own.yaml").write_text(dump_config(small_run(random_checkpoint("qwen3"), tmp_path)))
    settings = {
        "training.steps": 1,
        "training.lr": 0.1,
        "evaluation.samples": 0,
        "evaluation.deployed": False,
    }
    report = midtune.train(tmp_path / "own.yaml", settings, out=tmp_path / "run", quiet=True)
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert written == written | {key: report[key] for key in report.keys() - {"run"}}
    ids = torch.arange(5, 25)[None]
    for quantize in ("none", "nf4"):
        model, tokenizer = midtune.load(report["run"], quantize=quantize, device="cpu")
        policy = load_policy(resolve(report["model"]), quantize=quantize, device="cpu")
        untrained = policy.model(ids).logits
        apply_patch(policy, tmp_path / "run" / "patch")
        assert torch.equal(model(ids).logits, policy.model(ids).logits)
        assert not torch.equal(model(ids).logits, untrained)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 22)
        assert tokenizer.decode([3, 4])


def test_blocks_are_ranked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "midtune.stages.probe.run",
        lambda config, **given: asked.append(given | {"config": config}) or {"selected": [3]},
    )
    assert midtune.probe("sweep-tiny-chain-sum", {"seed": 4}, out=tmp_path, quiet=True) == {"selected": [3]}
    (given,) = asked
    assert (given["config"].seed, given["config"].probe.seeds, given["out"]) == (4, 3, tmp_path)


def test_errors_are_those_of_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stage, "run", lambda *_, **__: {})
    with pytest.raises(InputError, match="the nearest valid key is `training.lr`"):
        midtune.train(settings={"training.lrr": 1})
    with pytest.raises(InputError, match="no task was given for smollm2-135m"):
        midtune.train(settings={"model.name": "smollm2-135m"})
    with pytest.raises(InputError, match="is neither a run folder nor a patch folder"):
        midtune.load(tmp_path)
