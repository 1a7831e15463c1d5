"""What is shown while a model is fetched or converted."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, "int | None", "int | None"], None]
"""Called with a message, how much is done and how much there is (None: unknown)."""


def silent(message: str, done: int | None, total: int | None) -> None:
    """Default progress: show nothing."""
