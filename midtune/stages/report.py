"""`midtune report`: redraw the page of a run, or draw one page that compares several."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from midtune.errors import InputError
from midtune.probe.selection import read_probe
from midtune.report.page import GENERATOR, Run, comparison_page, run_page
from midtune.report.summary import SCHEMA
from midtune.runs import RunFolder
from midtune.whole import require_writable, write_bytes


def run(folders: Sequence[Path], *, out: Path | None) -> dict[str, Any]:
    """Write the page of one run, or one page that compares several.

    Without `out`: `report.html` in the folder of a single run, `comparison.html` here for several.
    Returns `page`, the file written, and `runs`, the folders.

    Raises InputError if a folder is no finished training run, or `out` is not writable or not a page of midtune's.
    """
    opened = [RunFolder.open(folder) for folder in folders]
    runs = [read_run(folder) for folder in opened]
    alone = len(runs) == 1
    file = out or (folders[0] / opened[0].page.name if alone else Path("comparison.html"))
    require_writable(file)
    if file.is_file() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise InputError(f"{file} exists and is no page that midtune wrote; choose another name with --out.")
    write_bytes(file, (run_page(runs[0]) if alone else comparison_page(runs)).encode("utf-8", "replace"))
    return {"page": str(file), "runs": [str(folder) for folder in opened]}


def read_run(folder: RunFolder) -> Run:
    """Read what the page needs; raises InputError if this is no finished training run, or a file is damaged."""
    if not folder.report.is_file():
        if folder.probe.is_file() and not folder.start.is_file():
            raise InputError(f"{folder} holds a ranking of blocks; give the folder of a training run.")
        raise InputError(
            f"{folder} has no report.json, so its training has not finished; "
            f"go on with `midtune train --resume {folder}`."
        )
    report = folder.read_json(folder.report)
    if report.get("schema") != SCHEMA:
        raise InputError(
            f"report.json in {folder} has schema {report.get('schema')}, but this midtune reads schema {SCHEMA}; "
            "use the version that made it."
        )
    return Run(
        path=str(folder),
        config=_settings(folder),
        report=report,
        metrics=folder.read_metrics(),
        environment=_optional(folder, folder.environment),
        problems=_optional(folder, folder.before_after).get("problems", []),
        probe=_ranking(folder, report),
        exports=_optional(folder, folder.exports).get("forms", {}),
    )


def _ranking(folder: RunFolder, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ranking that chose the blocks, or else the one in the folder, if readable."""
    chosen_by = _optional(folder, folder.start).get("ranking")
    for file in (Path(chosen_by) if chosen_by else folder.probe, folder.probe):
        with contextlib.suppress(InputError):
            probe = read_probe(file)
            # The file may hold another ranking by now.
            if all(probe.get(key) == report[key] for key in ("model", "task")):
                return probe
    return None


def _settings(folder: RunFolder) -> dict[str, Any]:
    """The run's settings as written, unchecked: a page only shows them."""
    import yaml

    settings = None
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
        settings = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise InputError(f"config.yaml in {folder} is damaged; put the settings of the run back.")
    return settings


def _optional(folder: RunFolder, file: Path) -> dict[str, Any]:
    return folder.read_json(file) if file.is_file() else {}
