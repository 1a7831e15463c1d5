"""The process that a command runs in: its standard streams, and libraries that load fast and say nothing."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from midtune.errors import plain


def hold_streams() -> None:
    """Make sure that there are standard streams, and that no text fails to be written to them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the first file to be opened would get the number, and what is meant for a person.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_read(stream: Any) -> bool:
    """Flush a stream; if nobody reads it, send the rest to nowhere, without another error."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def say(text: str) -> None:
    """Write to stderr, if it is read."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(plain(text))
    is_read(sys.stderr)


def quieten_libraries(debug: bool) -> None:
    """Ask libraries for no progress bars and, unless `debug`, for no warnings."""
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }
    if not debug:
        quiet |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
        warnings.simplefilter("ignore")
        # They recommend a package that midtune has no use for, and report on their own caches.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import libraries without collecting garbage, whose search takes longer the more there is, and finds none."""
    gc.disable()
    try:
        yield
    finally:
        # What lives as long as the process is never searched again.
        if gc.get_freeze_count() == 0:
            gc.freeze()
        gc.enable()
