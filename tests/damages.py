"""Every file of a run folder damaged in turn, and the run gone on with: `python -m tests.damages`.

A bit is flipped in the middle, the second half is cut off, or the file is removed. That is detected where the command
refuses with a sentence, harmless where it goes on to the same result, and accepted where the result is another one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from midtune.errors import InputError
from midtune.model.patch import read_patch
from midtune.probe.selection import read_probe
from midtune.runs import RunFolder
from midtune.stages.report import read_run
from tests import kills

DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda file: file.write_bytes(_flipped(file.read_bytes())),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "removed": Path.unlink,
}
REFUSED = (2, 3)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damages(folder: Path, names: list[str]) -> tuple[Counter[str], list[str]]:
    """Damage what a training run and a race hold, and what they end with; returns outcomes, and what is wrong."""
    found: Counter[str] = Counter()
    wrong: list[str] = []

    def every(name: str, begun: Path, whole: Path, command: list[str]) -> None:
        expected = kills.result(whole)
        # What had been begun when the process was killed goes in any case.
        files = [file for file in sorted(begun.rglob("*")) if file.is_file() and "/." not in str(file)]
        for file in files:
            for damage, act in DAMAGES.items():
                one = folder / "one"
                shutil.rmtree(one, ignore_errors=True)
                shutil.copytree(begun, one)
                act(one / file.relative_to(begun))
                code = kills.run([part.replace("RUN", str(one)) for part in command], one)
                what = f"{name}: {file.relative_to(begun)} {damage}"
                result = kills.result(one) if code == 0 else {}
                # What a run does not write again may stay as it was damaged.
                apart = {key for key, content in expected.items() if result.get(key) != content}
                if code in REFUSED:
                    outcome = "detected"
                elif code == 0 and not apart - {"environment.json", "metrics.jsonl", "samples.jsonl"}:
                    outcome = "harmless"
                else:
                    outcome = "accepted" if code == 0 else "unexpected"
                found[outcome] += 1
                print(f"{what}: {outcome}", flush=True)
                if outcome in ("accepted", "unexpected"):
                    wrong.append(f"{what}: {code}, {sorted(apart)} differ, {kills.said(one)}")

    def read(name: str, file: Path, act: Callable[[Path], object], content: Callable[[], object]) -> None:
        kept, expected = file.read_bytes(), content()
        act(file)
        try:
            same = content() == expected
            found["harmless" if same else "accepted"] += 1
            if not same:
                wrong.append(f"{name}: {file.name} {act}")
        except InputError:
            found["detected"] += 1
        file.write_bytes(kept)

    for name, moment, go_on in (
        ("train", 0.62, ["train", "--resume", "RUN", "--quiet"]),
        ("race", 0.7, ["probe", "--resume", "RUN", "--quiet"]),
    ):
        if name not in names:
            continue
        whole, begun, log = folder / name, folder / f"{name}-begun", folder / f"{name}.moments"
        assert kills.run([*kills.COMMANDS[name], "--out", str(whole)], whole, counted=log) == 0
        at = int(moment * len(log.read_text().splitlines()))
        kills.run([*kills.COMMANDS[name], "--out", str(begun)], begun, kill_at=at)
        every(name, begun, whole, go_on)
        for act in DAMAGES.values():
            if name == "race":
                read(name, whole / "probe.json", act, lambda: read_probe(folder / "race"))
                continue
            for file in sorted((whole / "patch").iterdir()):
                read(name, file, act, lambda: _patch(folder / "train/patch"))
            read(name, whole / "report.json", act, lambda: read_run(RunFolder.open(folder / "train")).report)
    return found, wrong


def _patch(folder: Path) -> object:
    patch = read_patch(folder)
    return patch, (folder / "patch.safetensors").read_bytes()


def main() -> None:
    """Damage every file and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--runs", nargs="+", choices=["train", "race"], default=["train", "race"])
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="midtune-damages-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    kills.ready()
    found, wrong = damages(folder, asked.runs)
    print(f"{found.total()} damaged files: {dict(found)}")
    print(*wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
