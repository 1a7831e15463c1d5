"""The command's process: its standard streams, and libraries that load fast and quietly."""

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
    """Make sure that standard streams exist, and that every text can be written to them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file opened would get the stream's number, and its output.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_read(stream: Any) -> bool:
    """Flush a stream; if nobody reads it, discard the rest without another error."""
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
    """Turn off libraries' progress bars and, unless `debug`, their warnings."""
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }
    if not debug:
        quiet |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
        warnings.simplefilter("ignore")
        # They recommend a package midtune does not use, and report on their own caches.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def join_card_memory() -> None:
    """Let pieces of a card's memory grow: a rollout's tensors change their sizes, and would leave holes.

    Call it before torch starts CUDA; a setting of the user's own stays.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import libraries with garbage collection off: it gets slower with every object, and finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        # Never search again what lives as long as the process.
        if gc.get_freeze_count() == 0:
            gc.freeze()
        gc.enable()
