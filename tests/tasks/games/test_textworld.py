"""Quests that textworld makes up."""

from __future__ import annotations

import pytest

from midtune.tasks.environment import Match
from midtune.tasks.games.textworld import TextWorld


def test_a_quest_gives_its_points() -> None:
    pytest.importorskip("textworld")
    match = Match("it", TextWorld())
    shown = match.reset({"prompt": "", "seed": 3, "rooms": 1, "objects": 2, "quest": 1})["prompt"]
    commands = shown.rpartition("You can: ")[2].removesuffix("\nCommand:").split(", ")
    assert "unlock box with keycard" in commands
    assert match.step("look")[1] == 0.0
    assert not match.over
    assert match.step("unlock box with keycard\nlook")[1] == 1.0
    assert match.over
