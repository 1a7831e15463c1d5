"""What can be merged; what a merged checkpoint holds is tested in model/test_patch and stages/test_train."""

from __future__ import annotations

from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.stages import merge


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="is neither a run folder nor a patch folder; give a folder that `train`"
    ):
        merge.run(tmp_path, out=tmp_path / "merged", terminal=Terminal(quiet=True))
    assert not (tmp_path / "merged").exists()


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "")
    run.begin("{}", "cpu", 0)
    with pytest.raises(InputError, match="has no trained patch yet; finish it with `midtune train --resume"):
        merge.run(run.path, out=tmp_path / "merged", terminal=Terminal(quiet=True))
