"""Runs that are killed, each continued and compared with one that was not: `python -m tests.kills --kills 100`.

A process kills itself, by SIGKILL, at one of the moments at which it touches its run folder: a file opened, renamed or
removed there, a folder made. The moments of a whole run are counted first, and the kills are spread over them, so
that they fall into loading, scoring, steps, the writing of checkpoints and of the patch, and reporting.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SMALL = ["--eval-size", "8", "--samples", "1", "--prompts-per-step", "2", "--seed", "3", "--quiet"]
UNDEPLOYED = ["--set", "evaluation.deployed=false"]
COMMANDS = {
    "train": ["train", "--top-k", "1", "--steps", "5", "--baseline", "estimated", *UNDEPLOYED, *SMALL],
    "race": ["probe", "--layers", "4,5", "--steps", "4", "--budget", "6 steps", *SMALL],
    "sweep": ["probe", "--method", "sweep", "--quantize", "none", "--layers", "4,5", "--steps", "3", *SMALL],
}
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
# What the clock and the memory say, which no two runs share.
MEASURED = {
    *("step_s", "train_s", "score_s", "rollout_s", "reward_s", "update_s", "elapsed_s", "tokens_per_s"),
    *("memory_bytes", "time", "memory", "step_cost", "gain_per_second", "cost_seconds", "digest"),
}


@dataclass
class Tally:
    """What became of the kills of a campaign."""

    kills: int = 0
    continued: int = 0
    equal: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


def campaign(kills: int, folder: Path) -> Tally:
    """Kill so many runs, a third of them each of `train`, a race and a sweep, and continue each."""
    tally = Tally()
    for place, (name, command) in enumerate(COMMANDS.items()):
        own = kills // 3 + (place < kills % 3)
        if own == 0:
            continue
        whole = folder / name
        moments = folder / f"{name}.moments"
        assert run([*command, "--out", str(whole)], whole, counted=moments) == 0
        # The last moment removes the lock of a run that is complete.
        count = len(moments.read_text().splitlines())
        for kill in range(own):
            one = folder / f"{name}-{kill}"
            moment = 1 + kill * count // own
            killed = run([*command, "--out", str(one)], one, kill_at=moment)
            if killed != -signal.SIGKILL:
                tally.failed.append(f"{name} {moment}: was not killed but ended with {killed}")
                continue
            tally.kills += 1
            tally.moments[phase(name, one)] += 1
            begun = (one / "config.yaml").exists()
            go_on = [command[0], "--resume", str(one), "--quiet"] if begun else [*command, "--out", str(one)]
            ended = run(go_on, one)
            if ended != 0:
                tally.failed.append(f"{name} {moment} of {count}: ended with {ended}, {said(one)}")
                continue
            tally.continued += 1
            apart = [file for file, content in result(whole).items() if result(one).get(file) != content]
            left = [str(path) for path in one.rglob(".*")]
            if apart or left:
                tally.failed.append(f"{name} {moment} of {count}: {apart} differ, {left} are left")
            else:
                tally.equal += 1
                shutil.rmtree(one)
    return tally


def run(command: list[str], folder: Path, kill_at: int | None = None, counted: Path | None = None) -> int:
    """Run midtune in a fork of this process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            output = os.open(f"{folder}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            _watch(folder, kill_at, counted)
            from midtune.cli import main

            main(command)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def _watch(folder: Path, kill_at: int | None, counted: Path | None) -> None:
    own, seen = os.getpid(), 0
    log = counted.open("w") if counted is not None else None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in TOUCHES or os.getpid() != own:
            return
        if not isinstance(args[0], str | os.PathLike) or not os.fspath(args[0]).startswith(f"{folder}"):
            return
        if f"{os.fspath(args[0])}/".startswith(f"{folder}/"):
            seen += 1
            if log is not None:
                log.write(f"{event} {args[0]}\n")
                log.flush()
            if seen == kill_at:
                os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)


def phase(name: str, folder: Path) -> str:
    """What a killed run was doing, by what it left."""
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.is_dir() else set()
    if "config.yaml" not in left:
        return f"{name}: loading"
    if any(path.split("/")[-1].startswith(".checkpoint-") for path in left):
        return f"{name}: writing a checkpoint"
    if name != "train":
        lines = (folder / "trials.jsonl").read_text().count("\n") if "trials.jsonl" in left else 0
        if "probe.json" in left or any(path.startswith(".probe") for path in left):
            return f"{name}: reporting"
        return f"{name}: scoring before training" if lines == 0 else f"{name}: trials"
    if "patch" in left or any(path.startswith(".patch") for path in left):
        return f"{name}: reporting"
    if "metrics.jsonl" not in left:
        return f"{name}: scoring before training"
    steps = (folder / "metrics.jsonl").read_text().count("\n")
    return f"{name}: steps" if steps < 5 else f"{name}: after the last step, scoring"


def said(folder: Path) -> str:
    return " ".join(Path(f"{folder}.output").read_text().split())[-300:]


def result(folder: Path) -> dict[str, Any]:
    """What a run leaves, by file, without what was measured and where it lies."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name.startswith("checkpoints/"):
            # Which steps have one is a matter of time; the last always has.
            name = name if name.startswith(_last(folder)) else ""
        if file.suffix == ".jsonl":
            found[name] = [_plain(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.suffix == ".json" and file.name not in ("manifest.json", "trainer_state.json"):
            with contextlib.suppress(ValueError):
                found[name] = _plain(json.loads(file.read_text()))
        elif file.suffix == ".yaml":
            found[name] = yaml.safe_load(file.read_text())
        elif name and file.suffix in (".safetensors", ".pt", ".pth"):
            found[name] = file.read_bytes()
    return found


def _last(folder: Path) -> str:
    steps = [int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").glob("checkpoint-*")]
    return f"checkpoints/checkpoint-{max(steps, default=0)}/"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        items = value.items()
        return {k: _plain(v) for k, v in items if k not in MEASURED and not k.endswith("_peak_bytes")}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def ready() -> None:
    """Import what runs need once, so that each begins in a moment."""
    import torch

    torch.set_num_threads(1)
    import matplotlib.backends.backend_svg  # noqa: F401

    from midtune.cli import main
    from midtune.stages import probe, train  # noqa: F401

    # No gradients are taken here, whose threads a fork would not have.
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(["eval", "tiny", "--eval-size", "8", "--quiet"])


def main() -> None:
    """Run a campaign and print its tally."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=None, help="where failed runs are kept")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="midtune-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    ready()
    started = time.monotonic()
    tally = campaign(asked.kills, folder)
    print(f"{tally.kills} kills, {tally.continued} continued, {tally.equal} to the same bytes")
    for name, count in sorted(tally.moments.items()):
        print(f"  {count:3} {name}")
    print(*tally.failed, sep="\n")
    print(f"{time.monotonic() - started:.0f} s, in {folder}")
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
