import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from midtune import runs
from midtune.errors import InputError, RunStopped
from midtune.runs import RunFolder, describe_environment, run_stem
from midtune.whole import written_whole


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
        RunFolder.create(Path("big"), "x").require_free(2**50)
    RunFolder.create(Path("small"), "x").require_free(1)


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
    assert run.latest_checkpoint(print) is None
    for step in (9, 50, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no whole checkpoint to resume from: manifest\.json is missing"):
        run.latest_checkpoint(print)
    for step in (9, 50):
        with written_whole(run.checkpoints / f"checkpoint-{step}") as folder:
            (folder / "a").write_text("1")
    (run.checkpoints / ".checkpoint-200.1.tmp" / "checkpoint-200").mkdir(parents=True)
    said: list[str] = []
    assert run.latest_checkpoint(said.append) == run.checkpoints / "checkpoint-50"
    (run.checkpoints / "checkpoint-50" / "a").write_text("2")
    assert run.latest_checkpoint(said.append) == run.checkpoints / "checkpoint-9"
    assert said[-1] == (
        "checkpoint-50 of run is damaged (a does not have its checksum); looking for an older one"
    )


def test_truncate_metrics_keeps_a_line_a_step(here: Path) -> None:
    run = started(here / "run")
    run.truncate_metrics(2)
    for step in (1, 2, 3):
        run.append_jsonl(run.metrics, {"step": step, "loss": float("inf")})
        run.append_jsonl(run.samples, {"step": step, "text": "two\nlines\u2028and a separator, é"})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.truncate_metrics(2) == []
    assert run.read_metrics() == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert [json.loads(line)["step"] for line in run.samples.read_text().split("\n")[:-1]] == [1, 2]


def test_a_damaged_line_of_metrics_goes_and_is_told(here: Path) -> None:
    run = started(here / "run")
    for step in (1, 2, 3):
        run.append_jsonl(run.metrics, {"step": step, "loss": 0.25})
    run.metrics.write_text(run.metrics.read_text().replace("0.25", "0.75", 1))
    with pytest.raises(InputError, match="metrics.jsonl in run is damaged"):
        run.read_metrics()
    assert run.truncate_metrics(3) == [1]
    assert [line["step"] for line in run.read_metrics()] == [2, 3]


@pytest.mark.parametrize("damage", ["seed: 1\n", "", "se"])
def test_a_config_that_is_not_what_the_run_wrote_is_refused(here: Path, damage: str) -> None:
    run = RunFolder.create(Path("run"), "x")
    run.begin("seed: 0\n", "cpu", 0)
    assert RunFolder.open(Path("run")) == run
    run.config.write_text(run.config.read_text().replace("seed: 0\n", damage))
    with pytest.raises(InputError, match="config.yaml in run is not what the run wrote; restore it"):
        RunFolder.open(Path("run"))
    run.config.write_text("")
    with pytest.raises(InputError, match="config.yaml in run is not what the run wrote; restore it"):
        RunFolder.open(Path("run"))


def test_every_flip_in_a_json_file_is_seen_or_changes_nothing(here: Path) -> None:
    run = started(here / "run")
    run.write_json(run.start, {"choice": "é", "greedy": [0.0, 1.0, 0.25], "sampled": None})
    whole, known = run.start.read_bytes(), run.read_json(run.start)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        run.start.write_bytes(damaged)
        try:
            found = run.read_json(run.start)
        except InputError:
            continue
        assert {key: found[key] for key in known} == known


def test_a_folder_is_worked_in_by_one_process_and_free_when_it_dies(here: Path) -> None:
    run = started(here / "run")
    code = "\n".join(
        [
            "import sys, time, pathlib",
            "from midtune.runs import RunFolder",
            "with RunFolder.open(pathlib.Path('run')).locked():",
            "    print('held', flush=True)",
            "    time.sleep(60)",
        ]
    )
    path = os.pathsep.join(sys.path)
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another midtune is at work in run"), run.locked():
        pass
    other.kill()
    other.wait()
    (run.path / ".metrics.jsonl.7.tmp").touch()
    (run.path / ".patch.7.tmp" / "patch").mkdir(parents=True)
    with run.locked():
        assert sorted(file.name for file in run.path.iterdir()) == [".lock", "config.yaml"]
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]


def test_a_folder_that_vanishes_is_not_made_again(here: Path) -> None:
    run = RunFolder.create(Path("run"), "x")
    with run.locked():
        run.begin("seed: 0\n", "cpu", 0)
        shutil.rmtree(run.path)
        with pytest.raises(RunStopped, match="run was removed while it was worked in"):
            run.append_jsonl(run.metrics, {"step": 1})
        assert not run.path.exists()
        # Another that took its name is not written to.
        other = started(here / "run")
        with pytest.raises(RunStopped, match="run was removed while it was worked in"):
            run.write_json(run.report, {})
        assert [file.name for file in other.path.iterdir()] == ["config.yaml"]


def test_a_run_killed_at_its_very_beginning_leaves_its_name_free(here: Path) -> None:
    (here / "run").mkdir()
    for name in (".lock", ".config.yaml.7.tmp", "start.json", "environment.json"):
        (here / "run" / name).touch()
    run = RunFolder.create(Path("run"), "x")
    with run.locked():
        run.begin("seed: 0\n", "cpu", 0)
    assert RunFolder.open(Path("run")).config.is_file()


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


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("Qwen/Qwen3-1.7B-Base", "openai/gsm8k:main", "Qwen3-1.7B-Base-gsm8k"),
        ("models/qwen.Q4_1.gguf", "data/my.problems.jsonl", "qwen.Q4_1-my.problems"),
        ("tiny", "my_task.py", "tiny-my_task"),
        ("tiny", "reasoning-gym:chain_sum", "tiny-chain_sum"),
    ],
)
def test_a_run_is_called_after_its_model_and_task(model: str, task: str, expected: str) -> None:
    assert run_stem(model, task) == expected
