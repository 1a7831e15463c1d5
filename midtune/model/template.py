"""Render a chat template, which is a program, within limits of time and memory."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from midtune.errors import InputError, reason

# One conversation takes at most a millisecond.
LONGEST_S = 5.0
_MOST_BYTES = 4 * 2**30


class _TooLong(BaseException):
    """Not an Exception: Jinja swallows those while it folds constants."""


@contextlib.contextmanager
def rendering(longest_s: float = LONGEST_S) -> Iterator[None]:
    """Limit a call of `apply_chat_template`; InputError if the template is wrong, endless or takes too much memory."""
    from jinja2 import TemplateError

    why = ""
    try:
        with _time_limit(longest_s), _memory_limit():
            yield
    except _TooLong:
        why = f"it does not end within {longest_s:g} s"
    except MemoryError:
        why = "it asks for more memory than any conversation takes"
    except RecursionError:
        why = "it calls itself without end"
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        why = reason(error)
    if why:
        raise InputError(
            f"the model's chat template cannot be used ({why}); correct chat_template.jinja in its folder, or use "
            "--prompt-format plain."
        )


@contextlib.contextmanager
def _time_limit(longest_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    handler = signal.signal(signal.SIGALRM, stop)
    left_s, every_s = signal.setitimer(signal.ITIMER_REAL, longest_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left_s, every_s)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [taken + _MOST_BYTES, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
