"""The versions that were tested, in tests/constraints.txt, are versions that midtune asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_every_dependency_has_a_tested_version_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])]
    lines = (ROOT / "tests/constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {}
    for pin in (Requirement(line) for line in lines if not line.startswith("#")):
        (version,) = pin.specifier
        assert version.operator == "==", pin
        tested[canonicalize_name(pin.name)] = version.version
    wrong = [
        str(want)
        for want in asked
        if not want.specifier.contains(tested.get(canonicalize_name(want.name), "0"))
    ]
    assert wrong == []


def test_the_readme_names_it() -> None:
    assert "-c tests/constraints.txt" in (ROOT / "README.md").read_text(encoding="utf-8")
