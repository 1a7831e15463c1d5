"""Prepared models are whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.model.cache import build_once
from midtune.model.sources import resolve
from tests.model import toy_gguf


def test_a_build_that_fails_leaves_nothing(own_cache: Path) -> None:
    target = own_cache / "model"

    def fail(work: Path) -> Path:
        (work / "model").mkdir()
        (work / "model" / "config.json").write_text("{}")
        assert not target.exists()
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        build_once(target, fail, need_bytes=0)
    assert not list(own_cache.glob("[!.]*"))
    assert not (own_cache / ".model.part").exists()


def test_what_a_killed_build_left_is_cleared(own_cache: Path, folder: Path) -> None:
    (own_cache / ".model.part" / "rubbish").mkdir(parents=True)

    def build(work: Path) -> Path:
        assert list(work.iterdir()) == []
        shutil.copytree(folder, work / "new")
        return work / "new"

    assert build_once(own_cache / "model", build, need_bytes=0) == own_cache / "model"
    assert [path.name for path in own_cache.glob("[!.]*")] == ["model"]


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written .* set MIDTUNE_CACHE"):
        resolve(str(toy_gguf.write(tmp_path / "toy.gguf")))
