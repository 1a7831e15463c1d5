"""RunFolder: the name of everything a run leaves on disk, written so that a crash loses nothing."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from midtune.errors import InputError

RUNS = Path("runs")
GIB = 2**30
REPORTED_PACKAGES = ("midtune", "torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass
class RunFolder:
    """One run's folder.

    A new one is only a name until something is written, so that an input found wrong later leaves
    nothing behind; code that writes without the methods below calls `make` first.

    Args:
        path: absolute path of the folder.
    """

    path: Path
    _unwritten: bool = field(default=False, repr=False, compare=False)

    @classmethod
    def create(cls, path: Path | None, default_stem: str, *, need_bytes: int = 0) -> RunFolder:
        """The folder of a run that starts now; nothing is written yet.

        Args:
            path: where the user wants it; None: `runs/<default_stem>`, with -2, -3… when that is taken.
            default_stem: the name when `path` is None; characters unfit for a file name become `-`.
            need_bytes: free disk space the run will need.

        Raises:
            InputError: `path` is a file or holds files, cannot be written, or the disk is too full.
        """
        run = cls((_free_name(default_stem) if path is None else path).absolute(), _unwritten=True)
        if run.path.is_dir() and any(run.path.iterdir()):
            what = "holds another run" if run.config.exists() else "is not empty"
            raise InputError(
                f"{run} {what}; choose another folder with --out, or continue a run with --resume."
            )
        if run.path.exists() and not run.path.is_dir():
            raise InputError(f"{run} is a file, but a run needs a folder; choose another name with --out.")
        parent = _nearest_parent(run.path)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            why = "may not be written to" if parent.is_dir() else "is a file"
            raise InputError(
                f"{run} cannot be made because {parent} {why}; choose another folder with --out."
            )
        run.require_free(need_bytes)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that has already started.

        Raises:
            InputError: `path` is no run folder; the message says what it is.
        """
        run = cls(path.absolute())
        if not run.config.is_file():
            raise InputError(f"{run} is not a run folder: {_what_is(run.path)}.")
        return run

    def __str__(self) -> str:
        """The path as a person would type it from where they stand."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    @property
    def config(self) -> Path:
        """The resolved RunConfig."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, seed, git commit."""
        return self.path / "environment.json"

    @property
    def probe(self) -> Path:
        """The ranking of the blocks."""
        return self.path / "probe.json"

    @property
    def trials(self) -> Path:
        """One line for each short run of a probe, with its scores."""
        return self.path / "trials.jsonl"

    @property
    def depth_curve(self) -> Path:
        """A picture of the ranking by depth."""
        return self.path / "probe.svg"

    @property
    def start(self) -> Path:
        """Scores and some completions before training, and how the blocks were chosen."""
        return self.path / "start.json"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Some completions with their rewards."""
        return self.path / "samples.jsonl"

    @property
    def before_after(self) -> Path:
        """Completions of a few held-out problems before and after training, with their scores."""
        return self.path / "before_after.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `checkpoint-N` folders."""
        return self.path / "checkpoints"

    @property
    def patch(self) -> Path:
        """Folder of the trained blocks."""
        return self.path / "patch"

    @property
    def report(self) -> Path:
        """Quality, time and memory: the result."""
        return self.path / "report.json"

    @property
    def curve(self) -> Path:
        """A picture of the reward over the steps, with the scores before and after."""
        return self.path / "curve.svg"

    @property
    def page(self) -> Path:
        """The report for a browser."""
        return self.path / "report.html"

    def require_free(self, need_bytes: int) -> None:
        """Check that the disk has room for `need_bytes` more.

        Raises:
            InputError: it has not.
        """
        free = shutil.disk_usage(_nearest_parent(self.path)).free
        if free < need_bytes:
            raise InputError(
                f"{self} needs {need_bytes / GIB:.2f} GiB of disk space and {free / GIB:.2f} GiB are free; "
                "free some, or choose another disk with --out."
            )

    def make(self) -> None:
        """Make the folder if it is not there.

        Raises:
            InputError: another run took the name since `create`, while this one was getting ready.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._unwritten and any(self.path.iterdir()):
            raise InputError(
                f"{self} was taken by a run that started meanwhile; choose another name with --out."
            )
        self._unwritten = False

    def write_text(self, path: Path, text: str) -> None:
        """Put `text` into a file of this run: afterwards it holds all of it, or what it held before."""
        self.make()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Put `data` into a file of this run, as `write_text` does; infinities and NaN become null."""
        self.write_text(path, json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def append_jsonl(self, path: Path, data: Mapping[str, Any]) -> None:
        """Add one line to a file of this run; infinities and NaN become null."""
        self.make()
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(_plain(data), ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file of this run.

        Raises:
            InputError: the file is missing or is not a JSON object.
        """
        name = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        if not path.is_file():
            raise InputError(f"{self} has no {name}; the run has not come that far.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise InputError(
                f"{name} in {self} is damaged: it is not a JSON object; remove it and run again."
            )
        return data

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one a step; none where no step has been done."""
        if not self.metrics.is_file():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        found = {
            int(name[1]): folder
            for folder in self.checkpoints.glob("checkpoint-*")
            if (name := re.fullmatch(r"checkpoint-(\d+)", folder.name))
            and (folder / "trainer_state.json").is_file()
        }
        return found[max(found)] if found else None

    def truncate_metrics(self, step: int) -> None:
        """Forget what metrics.jsonl and samples.jsonl say about steps after `step`.

        A run resumed from the checkpoint of `step` does those steps again. A last line that a crash
        cut short goes too.
        """
        for path in (self.metrics, self.samples):
            if path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                kept = "".join(line + "\n" for line in text.split("\n") if _step_of(line) <= step)
                if kept != text:
                    self.write_text(path, kept)


def describe_environment(device: str, seed: int) -> dict[str, Any]:
    """What environment.json holds: versions, machine, device, seed and git commit. Never fails.

    Args:
        device: the device as the run uses it, such as `cuda:0 (NVIDIA L4)`.
        seed: the run's seed.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "seed": seed,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _free_name(stem: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"
    path, number = RUNS / name, 1
    while path.exists():
        number += 1
        path = RUNS / f"{name}-{number}"
    return path


def _nearest_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _what_is(path: Path) -> str:
    if not path.exists():
        return "it does not exist; give the folder that `midtune train` made"
    if path.is_file():
        return "it is a file; give the folder that `midtune train` made"
    for parent in path.parents[:2]:
        if (parent / "config.yaml").is_file():
            return f"it is a part of the run {RunFolder(parent)}; give that folder"
    if (path / "patch.json").is_file():
        return "it is a patch, the trained blocks alone; give the run they came from"
    if (path / "config.json").is_file():
        return "it is a model; give the folder that `midtune train` made"
    runs = sorted(config.parent.name for config in path.glob("*/config.yaml"))
    if runs:
        return f"it holds the runs {', '.join(runs[:5])}{'…' if len(runs) > 5 else ''}; give one of them"
    return "it has no config.yaml; give the folder that `midtune train` made"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    """`value` with what JSON has: paths as text, NumPy scalars as numbers, infinities and NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
