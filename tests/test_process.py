from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

import midtune
from midtune.process import fast_imports, is_read, join_card_memory, quieten_libraries, say


def test_a_stream_that_nobody_reads_takes_no_more_text_and_raises_nothing() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        stream.write("a")
        assert is_read(stream)
        os.close(reader)
        stream.write("b")
        assert not is_read(stream)
        stream.write("c")
        assert is_read(stream)


def test_what_is_said_has_no_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    say("a\x1b[31mb\n")
    assert stream.getvalue() == "ab\n"
    stream.close()
    say("nobody hears it")


@pytest.mark.parametrize(("debug", "verbosity"), [(False, "error"), (True, None)])
def test_libraries_are_quiet_unless_debugged(debug: bool, verbosity: str | None) -> None:
    with mock.patch.dict(os.environ, {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}, clear=True):
        quieten_libraries(debug)
        assert os.environ.get("TRANSFORMERS_VERBOSITY") == verbosity
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        # What a person has set stays.
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"


def test_garbage_is_collected_again_after_imports() -> None:
    with pytest.raises(ImportError), fast_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", "| true", "2>&1 >/dev/null | true"])
@pytest.mark.parametrize("arguments", ["tasks", "--help", "eval " + "x" * 300])
def test_nobody_has_to_read(arguments: str, closed: str) -> None:
    command = f"{{ {sys.executable} -m midtune {arguments}; echo $? >&9; }}"
    with tempfile.TemporaryFile() as codes:
        done = subprocess.run(
            ["bash", "-c", f"exec 9>&{codes.fileno()}; {command} {closed}"],
            capture_output=True,
            text=True,
            pass_fds=[codes.fileno()],
            cwd=Path(midtune.__file__).parents[1],
        )
        codes.seek(0)
        code = int(codes.read())
    assert code in ((2,) if arguments.startswith("eval") else (0, 1))
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "unexpected" not in done.stderr


def test_pieces_of_a_cards_memory_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    join_card_memory()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:128"
    join_card_memory()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"
