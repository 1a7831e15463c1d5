"""What is shown while a model is fetched, converted or loaded: midtune's own progress, not the libraries'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, "int | None", "int | None"], None]
"""Called with a message, how much is done and how much there is (None: unknown)."""


def silent(message: str, done: int | None, total: int | None) -> None:
    """Default progress: show nothing."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and notices out of midtune's display."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
