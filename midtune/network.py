"""Ask the hub without hanging: offline mode, calls with a deadline, and clear errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from midtune.errors import InputError, reason

OFFLINE = "MIDTUNE_OFFLINE"
HUB_OFFLINE = "HF_HUB_OFFLINE"  # the hub's own libraries read it when they are imported
REQUEST_TIMEOUT_S = 5.0
# Request timeouts do not cover name resolution, which can hang for half a minute.
REACH_TIMEOUT_S = 8.0

T = TypeVar("T")


def go_offline() -> None:
    """Fetch nothing from now on, as `--offline` asks."""
    os.environ[OFFLINE] = os.environ[HUB_OFFLINE] = "1"


def is_offline() -> bool:
    """Whether fetching is forbidden."""
    return _is_set(OFFLINE)


def hub_is_offline() -> bool:
    """Whether fetching from the hub is forbidden, also by `HF_HUB_OFFLINE`."""
    return is_offline() or _is_set(HUB_OFFLINE)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


class Unavailable(InputError):
    """The hub cannot be reached, or does not have the repository."""


class Unreachable(Exception):
    """The hub was not asked or does not answer; the message says why."""


def ask_hub(name: str, kind: str, call: Callable[[Any], T], revision: str | None = None) -> T:
    """The result of `call`, which gets the hub's `HfApi`; `kind` is `model` or `dataset`.

    Raises Unreachable if work is offline or no answer came within `REACH_TIMEOUT_S`, Unavailable if there is no such
    repository, and InputError if it is gated or has no such revision, or the name is invalid.
    """
    from huggingface_hub import HfApi, errors

    if hub_is_offline():
        raise Unreachable("work is offline")
    try:
        return within(REACH_TIMEOUT_S, lambda: call(HfApi()))
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its terms on its hub page, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(
            f"there is no file or folder {name} here and no {kind} {name} on the hub (or it is private: "
            "`hf auth login`); check the spelling."
        ) from None
    except errors.HFValidationError:
        raise InputError(f"`{name}` is not a valid hub id; write it as `org/name`.") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision {revision}; give a branch, tag or commit of it.") from None
    except transport_errors() as error:
        raise Unreachable(f"the hub cannot be reached ({reason(error)})") from None


def transport_errors() -> tuple[type[Exception], ...]:
    """Errors the hub's library raises when a connection fails."""
    from huggingface_hub import errors

    return errors.HTTPError, OSError  # type: ignore[attr-defined]  # httpx's, whose module name varies


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError; a late call stays on a thread that dies with the process."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised again below
            answer.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer.done():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer.result()
