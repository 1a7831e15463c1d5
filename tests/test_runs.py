import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from midtune import runs
from midtune.errors import InputError
from midtune.runs import RunFolder, describe_environment


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(path: Path) -> RunFolder:
    run = RunFolder.create(path, "unused")
    run.write_text(run.config, "seed: 0\n")
    return run


def test_create_writes_nothing_until_the_first_write(here: Path) -> None:
    run = RunFolder.create(None, "tiny")
    assert list(here.iterdir()) == []
    run.write_text(run.config, "seed: 0\n")
    assert (here / "runs/tiny/config.yaml").read_text() == "seed: 0\n"


def test_default_names_count_up(here: Path) -> None:
    names = []
    for _ in range(3):
        run = RunFolder.create(None, "Qwen/Qwen3-1.7B reasoning-gym:gcd")
        run.make()
        names.append(run.path.name)
    stem = "Qwen-Qwen3-1.7B-reasoning-gym-gcd"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_a_name_taken_while_the_run_got_ready_is_an_error(here: Path) -> None:
    first, second = RunFolder.create(None, "tiny"), RunFolder.create(None, "tiny")
    first.write_text(first.config, "seed: 1\n")
    with pytest.raises(InputError, match="runs/tiny was taken"):
        second.write_text(second.config, "seed: 2\n")
    first.write_text(first.config, "seed: 3\n")
    assert first.config.read_text() == "seed: 3\n"


def test_an_explicit_folder_may_exist_but_not_hold_files(here: Path) -> None:
    (here / "empty").mkdir()
    RunFolder.create(Path("empty"), "x").make()
    started(here / "old")
    with pytest.raises(InputError, match="old holds another run; choose another folder with --out.*--resume"):
        RunFolder.create(Path("old"), "x")
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").touch()
    with pytest.raises(InputError, match="notes is not empty"):
        RunFolder.create(Path("notes"), "x")
    with pytest.raises(InputError, match=r"notes/a.txt is a file"):
        RunFolder.create(Path("notes/a.txt"), "x")
    with pytest.raises(InputError, match=r"a\.txt is a file"):
        RunFolder.create(Path("notes/a.txt/run"), "x")


def test_too_little_disk_space(here: Path) -> None:
    with pytest.raises(
        InputError, match=r"big needs 1048576\.00 GiB of disk space and \d+\.\d\d GiB are free"
    ):
        RunFolder.create(Path("big"), "x", need_bytes=2**50)
    RunFolder.create(Path("small"), "x", need_bytes=1)


def test_open_says_what_a_folder_is_instead(here: Path) -> None:
    run = started(here / "mine" / "run")
    run.make()
    assert RunFolder.open(Path("mine/run")) == run
    (run.checkpoints / "checkpoint-5").mkdir(parents=True)
    (here / "model").mkdir()
    (here / "model" / "config.json").touch()
    (here / "patch").mkdir()
    (here / "patch" / "patch.json").touch()
    (here / "other").mkdir()
    (here / "file").touch()
    for path, what in {
        "nowhere": "it does not exist",
        "file": "it is a file",
        "model": "it is a model",
        "patch": "it is a patch",
        "mine": "it holds the runs run; give one of them",
        "mine/run/checkpoints/checkpoint-5": "it is a part of the run mine/run; give that folder",
        "other": "it has no config.yaml",
    }.items():
        with pytest.raises(InputError, match=f"^{path} is not a run folder: {what}"):
            RunFolder.open(Path(path))


def test_a_failed_write_leaves_the_old_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(here / "run")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write_text(run.config, "seed: 1\n")
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]
    assert run.config.read_text() == "seed: 0\n"


def test_json_holds_plain_values(here: Path) -> None:
    run = started(here / "run")
    run.write_json(
        run.report, {"a": np.float32(0.5), "b": float("nan"), "c": (1, Path("x")), "d": {"é": np.int64(3)}}
    )
    assert run.read_json(run.report) == {"a": 0.5, "b": None, "c": [1, "x"], "d": {"é": 3}}


def test_read_json_errors(here: Path) -> None:
    run = started(here / "run")
    with pytest.raises(InputError, match="run has no probe.json"):
        run.read_json(run.probe)
    run.write_text(run.probe, "[1]")
    with pytest.raises(InputError, match="probe.json in run is damaged"):
        run.read_json(run.probe)


def test_latest_checkpoint_is_the_highest_complete_one(here: Path) -> None:
    run = started(here / "run")
    assert run.latest_checkpoint() is None
    for step in (9, 50, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    assert run.latest_checkpoint() is None
    (run.checkpoints / "checkpoint-9" / "trainer_state.json").touch()
    (run.checkpoints / "checkpoint-50" / "trainer_state.json").touch()
    (run.checkpoints / "checkpoint-100.tmp").mkdir()
    (run.checkpoints / "checkpoint-100.tmp" / "trainer_state.json").touch()
    assert run.latest_checkpoint() == run.checkpoints / "checkpoint-50"


def test_truncate_metrics_keeps_a_line_a_step(here: Path) -> None:
    run = started(here / "run")
    run.truncate_metrics(2)
    for step in (1, 2, 3):
        run.append_jsonl(run.metrics, {"step": step, "loss": float("inf")})
        run.append_jsonl(run.samples, {"step": step, "text": "two\nlines\u2028and a separator, é"})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    run.truncate_metrics(2)
    assert run.metrics.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n'
    assert [json.loads(line)["step"] for line in run.samples.read_text().split("\n")[:-1]] == [1, 2]


def test_environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = describe_environment("cpu", seed=7)
    assert (found["device"], found["seed"], found["git_commit"]) == ("cpu", 7, None)
    assert set(found["versions"]) == {"python", *runs.REPORTED_PACKAGES}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    commit = describe_environment("cpu", seed=7)["git_commit"]
    assert len(commit) == 40
    monkeypatch.setenv("PATH", "")
    assert describe_environment("cpu", seed=7)["git_commit"] is None
