"""Games that cannot be played here."""

from __future__ import annotations

import sys

import pytest

from midtune.errors import InputError
from tests.tasks.toy_data import load


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(InputError, match=r"needs the package textworld; .*midtune\[textworld\]"):
        load("textworld")
