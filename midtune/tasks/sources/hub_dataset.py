"""Datasets of the Hugging Face hub, read with the `datasets` library, which runs no code of theirs."""

from __future__ import annotations

import re
from pathlib import Path

from midtune.errors import WHY, explained
from midtune.network import REQUEST_TIMEOUT_S, Unreachable, ask_hub
from midtune.tasks.sources.files import FORMATS, Source, data_suffix, of_splits

_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")


def is_dataset(name: str) -> bool:
    """Whether a task's name has the form `org/name` or `org/name:CONFIGURATION` of a hub dataset."""
    path = Path(name).expanduser()
    return bool(_ID.fullmatch(name)) and not (name.endswith(".py") or data_suffix(name) or path.exists())


def read_dataset(name: str) -> Source:
    """Read a hub dataset with its splits apart; InputError if it is unknown, gated, or neither cached nor reachable."""
    import datasets

    repository, _, configuration = name.partition(":")
    unread = (
        f"the dataset {name} cannot be read ({WHY}); write it as org/name or, where it has several configurations, "
        "org/name:CONFIGURATION."
    )
    why = None
    try:
        ask_hub(repository, "dataset", lambda hub: hub.dataset_info(repository, timeout=REQUEST_TIMEOUT_S))
    except Unreachable as error:
        why = str(error)
        unread = (
            f"{name} is neither a file or folder here nor in the cache of this machine, and {why}; go online once, "
            f"or give a {FORMATS} file or a folder of them."
        )
    known = datasets.config.HF_HUB_OFFLINE
    # Otherwise `datasets` would ask the hub again, several times.
    datasets.config.HF_HUB_OFFLINE = why is not None
    try:
        with explained(unread):
            loaded = datasets.load_dataset(repository, configuration or None)
    finally:
        datasets.config.HF_HUB_OFFLINE = known
    return of_splits(name, loaded)
