"""Asking the hub without waiting for it: whether work is offline, and calls that end in time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

OFFLINE = "MIDTUNE_OFFLINE"
HUB_OFFLINE = "HF_HUB_OFFLINE"  # the hub's own libraries read it when they are imported
REQUEST_TIMEOUT_S = 5.0
# The request's own timeouts do not cover name resolution, which can hang for half a minute.
REACH_TIMEOUT_S = 8.0

T = TypeVar("T")


def go_offline() -> None:
    """Fetch nothing from here on, as `--offline` asks."""
    os.environ[OFFLINE] = os.environ[HUB_OFFLINE] = "1"


def is_offline() -> bool:
    """Whether nothing may be fetched."""
    return _is_set(OFFLINE)


def hub_is_offline() -> bool:
    """Whether nothing may be fetched from the hub, which `HF_HUB_OFFLINE` says too."""
    return is_offline() or _is_set(HUB_OFFLINE)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError; a late call is left on a thread that dies with the process."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
