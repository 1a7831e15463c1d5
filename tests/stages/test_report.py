from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from midtune.config import load_config
from midtune.errors import InputError
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.stages import report, train
from midtune.stages.opening import Opened
from tests.report.toy_probe import toy_probe
from tests.stages.conftest import Configured


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, here and under the name `run`."""
    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_a_run_ends_with_its_page_and_the_command_writes_it_again(
    finished: tuple[Path, dict[str, Any]], copied: Path
) -> None:
    first = (copied / "report.html").read_text()
    (copied / "report.html").write_text("anything")
    with pytest.raises(InputError, match="run/report.html exists and is no page that midtune wrote"):
        report.run([copied], out=None)
    (copied / "report.html").unlink()
    assert report.run([copied], out=None) == {"page": "run/report.html", "runs": ["run"]}
    again = (copied / "report.html").read_text()
    assert "midtune merge run --out merged" in again
    assert again == first.replace(str(finished[0]), "run")
    for section in ("gain", "training", "problems", "cost"):
        assert f'<h2 id="{section}">' in again
    assert '<h2 id="ranking">' not in again


def test_a_run_keeps_what_it_answered_before_and_after(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    problems = json.loads((folder / "before_after.json").read_text())["problems"]
    task = Opened(load_config(folder / "config.yaml", {}), Terminal(quiet=True)).task
    assert [problem["prompt"] for problem in problems] == [
        row["prompt"][-1]["content"] for row in task.held_out[:4]
    ]
    start = json.loads((folder / "start.json").read_text())
    assert [problem["before"]["completion"] for problem in problems] == start["completions"]
    assert [problem["before"]["score"] for problem in problems] == start["greedy"][:4]
    for problem in problems:
        for when in ("before", "after"):
            text, score = problem[when]["completion"], problem[when]["score"]
            assert score == pytest.approx(sum(map(str.isdigit, text)) / max(len(text), 1))
    assert result["quality"]["after"]["n"] == 8


def test_a_run_from_before_there_were_pages_has_one(copied: Path) -> None:
    for name in ("report.html", "before_after.json", "start.json", "environment.json", "metrics.jsonl"):
        (copied / name).unlink()
    found = json.loads((copied / "report.json").read_text())
    del found["digest"]
    for key in ("compared_phases", "full_phases"):
        del found["time"][key]
    (copied / "report.json").write_text(json.dumps(found))
    report.run([copied], out=None)
    page = (copied / "report.html").read_text()
    assert '<h2 id="problems">' not in page and '<h2 id="training">' not in page


def test_the_ranking_that_chose_the_blocks_is_shown_while_it_can_be_read(copied: Path) -> None:
    found = json.loads((copied / "report.json").read_text())
    ranking = toy_probe([0.1, 0.3, 0.2, 0.1], model=found["model"], task=found["task"])
    Path("ranking").mkdir()
    Path("ranking/probe.json").write_text(json.dumps(ranking))
    start = json.loads((copied / "start.json").read_text())
    assert (start["ranking"], len(start.pop("digest"))) == (None, 16)
    (copied / "start.json").write_text(json.dumps({**start, "ranking": "ranking/probe.json"}))
    folder = RunFolder.open(copied)
    assert report.read_run(folder).probe == ranking
    report.run([copied], out=None)
    assert '<h2 id="ranking">' in (copied / "report.html").read_text()
    Path("ranking/probe.json").write_text(json.dumps({**ranking, "model": "another"}))
    assert report.read_run(folder).probe is None
    Path("ranking/probe.json").unlink()
    assert report.read_run(folder).probe is None
    (copied / "probe.json").write_text(json.dumps(ranking))
    assert report.read_run(folder).probe == ranking


def test_a_run_remembers_which_ranking_chose(configured: Configured, tmp_path: Path) -> None:
    config = configured(blocks__layers=None, blocks__probe=tmp_path / "probe.json", training__steps=1)
    task = Opened(config, Terminal(quiet=True)).task
    about = {"model": config.model.name, "task": task.name, "task_fingerprint": task.fingerprint}
    (tmp_path / "probe.json").write_text(json.dumps(toy_probe([0.1, 0.2, 0.1, 0.4], **about)))
    train.run(config, out=tmp_path / "run", resume=None, terminal=Terminal(quiet=True))
    assert json.loads((tmp_path / "run/start.json").read_text())["ranking"] == str(tmp_path / "probe.json")
    assert '<h2 id="ranking">' in (tmp_path / "run/report.html").read_text()


def test_several_runs_are_compared_on_one_page(copied: Path) -> None:
    shutil.copytree(copied, "other")
    runs = [copied, Path("other")]
    assert report.run(runs, out=None) == {"page": "comparison.html", "runs": ["run", "other"]}
    # A page of our own is written again, another file is not.
    assert report.run(runs, out=Path("comparison.html"))["page"] == "comparison.html"
    assert "2 runs compared" in Path("comparison.html").read_text()
    Path("notes.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match="notes.html exists and is no page that midtune wrote; choose"):
        report.run(runs, out=Path("notes.html"))
    assert Path("notes.html").read_text() == "<p>mine</p>"
    with pytest.raises(InputError, match="gone/a.html cannot be written because .*/gone is no folder"):
        report.run(runs, out=Path("gone/a.html"))
    with pytest.raises(InputError, match="other is a folder, and only files are written"):
        report.run(runs, out=Path("other"))
    assert not Path("gone").exists()


def test_what_is_no_finished_run_is_refused(copied: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a run folder: it does not exist"):
        report.run([copied, Path("nowhere")], out=None)
    kept = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(kept[:-9])
    with pytest.raises(InputError, match="metrics.jsonl in run is damaged"):
        report.run([copied], out=None)
    (copied / "metrics.jsonl").write_text(kept)
    found = json.loads((copied / "report.json").read_text())
    (copied / "report.json").write_text(json.dumps({**found, "schema": 2}))
    with pytest.raises(InputError, match="report.json in run is damaged: it is not what was written"):
        report.run([copied], out=None)
    del found["digest"]
    (copied / "report.json").write_text(json.dumps({**found, "schema": 2}))
    with pytest.raises(InputError, match="report.json in run has schema 2, but this midtune reads schema 1"):
        report.run([copied], out=None)
    (copied / "report.json").write_text("{")
    with pytest.raises(InputError, match="report.json in run is damaged"):
        report.run([copied], out=None)
    (copied / "report.json").unlink()
    with pytest.raises(InputError, match="has not finished; go on with `midtune train --resume run`"):
        report.run([copied], out=None)
    (copied / "start.json").unlink()
    (copied / "probe.json").write_text("{}")
    with pytest.raises(InputError, match="run holds a ranking of blocks; give the folder of a training run"):
        report.run([copied], out=None)
    assert not Path("comparison.html").exists()


def test_a_page_that_cannot_be_drawn_costs_no_run(
    configured: Configured, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(train, "run_page", fail)
    found = train.run(configured(training__steps=1), out=tmp_path / "run", resume=None, terminal=terminal)
    assert found["blocks"] == [2]
    assert (tmp_path / "run/report.json").is_file()
    shown = terminal.console.file.getvalue()  # type: ignore[attr-defined]
    assert "its pictures failed (RuntimeError: no fonts); try again with `midtune report" in shown
