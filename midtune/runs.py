"""RunFolder: names everything a run leaves on disk, and writes it so that a crash loses nothing."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midtune import whole
from midtune.errors import WHY, InputError, RunStopped, explained

if TYPE_CHECKING:
    from filelock import FileLock

RUNS = Path("runs")
# Trained tensors and two Adam moments in fp32, in the two kept checkpoints and the one being written.
CHECKPOINT_BYTES_PER_PARAMETER = 3 * 3 * 4
# Held while a process works in the folder.
LOCK = ".lock"
REPORTED_PACKAGES = ("midtune", "torch", "transformers", "trl", "peft", "bitsandbytes")


def _inside(name: str) -> cached_property[Path]:
    """The path of this name in a run's folder."""
    return cached_property(lambda run: run.path / name)


@dataclass
class RunFolder:
    """One run's folder, by its absolute path.

    A new one is only a name until the first write, so a wrong input leaves nothing behind. Code that writes without
    the methods below calls `make` first.
    """

    config = _inside("config.yaml")  # the resolved RunConfig
    environment = _inside("environment.json")  # versions, device, seed, git commit
    probe = _inside("probe.json")  # the ranking of the blocks
    trials = _inside("trials.jsonl")  # one line for each short run of a probe, with its scores
    depth_curve = _inside("probe.svg")  # the ranking by depth
    start = _inside("start.json")  # scores and completions before training, and how the blocks were chosen
    metrics = _inside("metrics.jsonl")  # one line a step
    samples = _inside("samples.jsonl")  # some completions with their rewards
    before_after = _inside("before_after.json")  # held-out completions before and after training, scored
    checkpoints = _inside("checkpoints")  # folder of `checkpoint-N` folders
    patch = _inside("patch")  # folder of the trained blocks
    report = _inside("report.json")  # quality, time and memory: the result
    exports = _inside("export.json")  # the forms it was exported in, with their scores
    curve = _inside("curve.svg")  # the reward over the steps, with the scores before and after
    page = _inside("report.html")  # the report for a browser

    path: Path
    writes: bool = field(default=True, compare=False)  # False: another process does
    _unwritten: bool = field(default=False, repr=False, compare=False)
    _locking: bool = field(default=False, repr=False, compare=False)
    _lock: FileLock | None = field(default=None, repr=False, compare=False)
    _identity: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def create(cls, path: Path | None, default_stem: str) -> RunFolder:
        """Choose the folder of a new run, `path` or else `runs/<default_stem>`, with -2, -3… if taken; writes nothing.

        In `default_stem`, characters unfit for a file name become `-`. Raises InputError if `path` is a file, holds
        files, or cannot be written.
        """
        run = cls((_free_name(default_stem) if path is None else path).absolute(), _unwritten=True)
        if run.path.is_dir() and run._holds_files():
            what = "holds another run" if run.config.exists() else "is not empty"
            raise InputError(
                f"{run} {what}; choose another folder with --out, or continue a run with --resume."
            )
        if run.path.exists() and not run.path.is_dir():
            raise InputError(f"{run} is a file, but a run needs a folder; choose another name with --out.")
        parent = whole.nearest_existing(run.path)
        if why := whole.why_not_written(parent):
            raise InputError(
                f"{run} cannot be made because {parent} {why}; choose another folder with --out."
            )
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a started run's folder; raises InputError if it is none, or its settings are not those the run wrote."""
        run = cls(path.absolute())
        if not run.config.is_file():
            raise InputError(f"{run} is not a run folder: {_what_is(run.path)}.")
        text = run.config.read_text(encoding="utf-8", errors="replace")
        sealed = re.match(r"# digest ([0-9a-f]{16})\n", text)
        settings = text[sealed.end() :] if sealed else text
        if not settings.strip() or (sealed and whole.digest(settings) != sealed[1]):
            raise InputError(
                f"config.yaml in {run} is not what the run wrote; restore it, or give other settings to a new run "
                "with --recipe."
            )
        return run

    @classmethod
    def resumed(cls, path: Path, command: str) -> RunFolder:
        """Open a run for `midtune COMMAND` to resume; raises InputError as `open`, or if another command made it."""
        run = cls.open(path)
        maker = (
            "train" if any(file.exists() for file in (run.start, run.metrics, run.checkpoints)) else "probe"
        )
        if maker != command:
            raise InputError(
                f"{run} was made by `midtune {maker}`, not by `midtune {command}`; go on with "
                f"`midtune {maker} --resume {run}`."
            )
        return run

    def __str__(self) -> str:
        """The path as the user would type it from the working directory."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def require_free(self, need_bytes: int) -> None:
        """Raise InputError unless the disk has room for `need_bytes` more."""
        whole.require_space(self.path, need_bytes, str(self), "choose another disk with --out")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, a new one when made; raises as `make`, and InputError if another process works in it."""
        if not self.writes:
            yield
            return
        self._locking = True
        try:
            if not self._unwritten:
                self._hold()
            yield
        finally:
            self._locking = False
            if self._lock is not None:
                if not self.is_gone():
                    (self.path / LOCK).unlink(missing_ok=True)
                self._lock.release()
                self._lock = None

    def _hold(self) -> None:
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK)
        try:
            # A killed process's lock may outlive it for a moment, while a child of it ends.
            lock.acquire(timeout=3)
        except Timeout:
            raise InputError(
                f"another midtune is at work in {self}; wait until it ends, or choose another folder with --out."
            ) from None
        self._lock, self._identity = lock, _identity(self.path)
        whole.remove_leftovers(self.path)

    def is_gone(self) -> bool:
        """Whether the locked folder no longer exists."""
        return self._identity is not None and _identity(self.path) != self._identity

    def make(self) -> None:
        """Make the folder if it is new.

        Raises InputError if another run took the name since `create`, RunStopped if the folder was removed since.
        """
        if self.is_gone():
            raise RunStopped(f"{self} was removed while it was worked in; start again.")
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if self._unwritten:
            if self._locking:
                self._hold()
            if self._holds_files():
                raise InputError(
                    f"{self} was taken by a run that started meanwhile; choose another name with --out."
                )
        self._unwritten = False

    def _holds_files(self) -> bool:
        """Whether the folder holds more than a run leaves that was killed before it wrote config.yaml."""
        names = {path.name for path in self.path.iterdir() if not re.fullmatch(r"\..*\.tmp", path.name)}
        return bool(names - {LOCK, "start.json", "environment.json"})

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of this run with `write_bytes`."""
        if self.writes:
            self.make()
            whole.write_bytes(path, text.encode("utf-8", "replace"))

    def begin(self, config: str, device: str, seed: int) -> None:
        """Write environment.json and config.yaml (the settings as YAML); from then on the run can be resumed."""
        self.write_json(self.environment, describe_environment(device, seed))
        self.write_text(self.config, f"# digest {whole.digest(config)}\n{config}")

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Write `data` and its digest to a file of this run; infinities and NaN become null."""
        self.write_text(path, _dumps(sealed(_plain(data)), indent=2) + "\n")

    def append_jsonl(self, path: Path, data: Mapping[str, Any]) -> None:
        """Append `data` and its digest as one line to a file of this run; infinities and NaN become null."""
        if not self.writes:
            return
        self.make()
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(_dumps(sealed(_plain(data))) + "\n")
            file.flush()
            # Checkpoints reach the disk at once, and the metrics of their steps should too.
            os.fsync(file.fileno())

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read a JSON file of this run; raises InputError if it is missing or not an object."""
        name = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        if not path.is_file():
            raise InputError(f"{self} has no {name}; the run has not come that far.")
        with explained(f"{name} in {self} is damaged: {WHY}; remove it and run again.", keep=(OSError,)):
            return unsealed(path.read_bytes())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, one line a step, empty before the first; raises InputError if a line is damaged."""
        lines = read_jsonl(self.metrics)
        steps = [data for _, data in lines if data is not None]
        if len(steps) < len(lines):
            raise InputError(f"metrics.jsonl in {self} is damaged; remove it, and the page has no curves.")
        return steps

    def latest_checkpoint(self, on_message: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, None if there are none; says which are damaged; raises InputError if all are."""
        wrong = None
        for _, checkpoint in sorted(checkpoints_in(self.checkpoints).items(), reverse=True):
            wrong = whole.damage(checkpoint)
            if wrong is None:
                return checkpoint
            on_message(f"{checkpoint.name} of {self} is damaged ({wrong}); looking for an older one")
        if wrong is not None:
            raise InputError(
                f"{self} has no whole checkpoint to resume from: {wrong} in {checkpoint.name}; restore it, or "
                "start the run again with another --out."
            )
        return None

    def rewind(self, on_message: Callable[[str], None]) -> tuple[Path | None, int, list[int]]:
        """Go back to the newest whole checkpoint: it and its step, None and 0 without one, and the steps then missing.

        See `latest_checkpoint`, which also raises, and `truncate_metrics`.
        """
        checkpoint = self.latest_checkpoint(on_message)
        step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        return checkpoint, step, self.truncate_metrics(step)

    def truncate_metrics(self, step: int) -> list[int]:
        """Drop damaged lines, and those of steps after `step`, from metrics and samples; the steps are done again.

        Returns the steps up to `step` that metrics.jsonl lacks.
        """
        for path in (self.metrics, self.samples):
            kept = b"".join(line + b"\n" for line, data in read_jsonl(path) if _step_of(data) <= step)
            if path.is_file() and kept != path.read_bytes():
                self.make()
                whole.write_bytes(path, kept)
        known = {line["step"] for line in self.read_metrics()}
        return [number for number in range(1, step + 1) if number not in known]


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Step → checkpoint, in a folder."""
    return {
        int(name[1]): path
        for path in folder.glob("checkpoint-*")
        if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Add a digest to plain data; `unsealed` checks and removes it."""
    return {**data, "digest": whole.digest(_dumps(data))}


def unsealed(content: bytes) -> dict[str, Any]:
    """Read the object in a JSON text, and check its digest if it has one; raises ValueError if it is damaged."""
    data: Any = None
    with suppress(ValueError):
        data = json.loads(content.decode("utf-8"))
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    expected = data.pop("digest", None)
    if expected is not None and whole.digest(_dumps(data)) != expected:
        raise ValueError("it is not what was written")
    return data


def read_jsonl(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Read the lines of an `append_jsonl` file, if it exists, with what each holds; None: damaged."""
    found: list[tuple[bytes, dict[str, Any] | None]] = []
    for line in filter(None, path.read_bytes().split(b"\n") if path.is_file() else []):
        try:
            found.append((line, unsealed(line)))
        except ValueError:
            found.append((line, None))
    return found


def _dumps(data: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)


def _identity(folder: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def run_stem(model: str, task: str | None) -> str:
    """Default name of a run's folder under `runs/`."""
    source, _, part = (task or "").partition(":")
    # `org/dataset:CONFIGURATION`, but `reasoning-gym:NAME`.
    return f"{_bare(model)}-{_bare(source if '/' in source or not part else part)}"


def _bare(name: str) -> str:
    """The last part of a name, without a file ending; `Qwen3-1.7B` has none."""
    return re.sub(r"\.[a-zA-Z][a-zA-Z-]*$", "", Path(name).name)


def describe_environment(device: str, seed: int) -> dict[str, Any]:
    """Contents of environment.json; `device` is such as `cuda:0 in bfloat16`. Never fails."""
    return {
        "versions": installed(REPORTED_PACKAGES),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "seed": seed,
        "git_commit": _git_commit(),
    }


def installed(packages: Sequence[str]) -> dict[str, str | None]:
    """The versions of Python and of packages, None for a missing one."""
    versions: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(packages)}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
        return done.stdout.strip() or None
    return None


def _free_name(stem: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"
    paths = (RUNS / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(path for path in paths if not path.exists())


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
    if runs := sorted(config.parent.name for config in path.glob("*/config.yaml")):
        return f"it holds the runs {', '.join(runs[:5])}{'…' if len(runs) > 5 else ''}; give one of them"
    return "it has no config.yaml; give the folder that `midtune train` made"


def _step_of(data: Mapping[str, Any] | None) -> float:
    step = None if data is None else data.get("step")
    return step if isinstance(step, int | float) else math.inf


def _plain(value: Any) -> Any:
    """`value` in JSON's types: paths as text, NumPy scalars as numbers, infinities and NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
