"""`midtune push` to a hub on localhost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midtune.errors import InputError
from midtune.model.patch import apply_patch, read_patch
from midtune.report.results import push_text
from midtune.report.terminal import Terminal
from midtune.stages import push
from tests.model import fake_hub
from tests.report.printed import rendered

NOTHING: dict[str, Any] = {"export": None, "token_file": None, "token_env": None, "out": None}
NOTHING |= {"public": False, "dry_run": False}
UseHub = Callable[[str], None]
Finished = tuple[Path, dict[str, Any]]


@pytest.fixture
def sent(
    finished: Finished,
    use_hub: UseHub,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[dict[str, Any], fake_hub.Repositories, fake_hub.Received]]:
    """A function: options, and what the hub has already → the result, what it has then, and what it was sent."""
    # Never to be sent.
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    monkeypatch.setenv("MINE", "hf_mine\n")

    def send(has: fake_hub.Repositories | None = None, **asked: Any) -> Any:
        repositories = {} if has is None else has
        received = fake_hub.Received()
        with fake_hub.serve(repositories, received=received, token="hf_mine") as address:
            use_hub(address)
            asked = NOTHING | {"token_env": "MINE"} | asked
            found = push.run(str(finished[0]), "me/sums", **asked, terminal=terminal)
        return found, repositories, received

    return send


def test_a_patch_is_sent_with_a_card_and_nothing_else(
    sent: Callable[..., Any], finished: Finished, load: Callable[..., Any], tmp_path: Path
) -> None:
    found, repositories, received = sent()
    folder, report = finished
    files = repositories["me/sums"]
    own = {file.name: file.read_bytes() for file in (folder / "patch").iterdir()}
    assert {name: files[name] for name in own} == own
    assert files.keys() - own.keys() == {"README.md"}
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "hf download me/sums --local-dir patch\nmidtune eval patch\n" in card
    assert received.private == {"me/sums"}
    assert {token for *_, token in received.requests} == {"Bearer hf_mine"}
    assert found["url"].endswith(f"/me/sums/commit/{fake_hub.COMMIT}")
    assert found["files"] == sorted(files) and found["bytes"] == sum(map(len, files.values()))
    # What arrives is a whole patch, which fits its base.
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert apply_patch(load("qwen3"), tmp_path) == read_patch(folder / "patch")
    assert report["blocks"] == [2]


def test_a_public_one_is_public(sent: Callable[..., Any]) -> None:
    found, _, received = sent(public=True)
    assert received.private == set() and found["public"]
    assert " ".join(rendered(push_text(found))).startswith("Public: http://127.0.0.1:")


def test_a_public_repository_gets_nothing_private(sent: Callable[..., Any]) -> None:
    there: fake_hub.Repositories = {"me/sums": {"old": b"x"}}
    with pytest.raises(InputError, match="me/sums is there already, and public; add --public"):
        sent(there)
    assert there == {"me/sums": {"old": b"x"}}


@pytest.mark.parametrize("given", [{}, {"token_env": "MINE", "token_file": Path("t")}])
def test_a_token_is_never_read_silently(
    sent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    there: fake_hub.Repositories = {}
    with pytest.raises(InputError, match="a token is read only from where you say"):
        sent(there, **{"token_env": None, **given})
    assert there == {}


def test_a_token_comes_from_a_file_and_is_refused_in_a_sentence(
    sent: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("hf_mine\n")
    assert sent(token_env=None, token_file=file)[0]["url"]
    file.write_text("hf_other")
    with pytest.raises(InputError, match="me/sums was not sent .*401.*; see that the token may write there"):
        sent(token_env=None, token_file=file)
    file.write_text("\n")
    with pytest.raises(InputError, match="token holds no token"):
        sent(token_env=None, token_file=file)


def test_a_dry_run_writes_what_would_be_sent(
    sent: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, repositories, received = sent(dry_run=True, token_env=None)
    assert (repositories, received.requests) == ({}, [])
    assert {file.name for file in Path("sums").iterdir()} == set(found["files"])
    assert "sums holds what would be sent to me/sums" in " ".join(rendered(push_text(found)))
    with pytest.raises(InputError, match="sums exists already"):
        sent(dry_run=True)


@pytest.mark.parametrize(
    ("config", "words"),
    [({}, "from_pretrained"), ({"quantization_config": {}}, "pip install transformers bitsandbytes")],
)
def test_an_export_is_sent_in_its_own_form(
    sent: Callable[..., Any], finished: Finished, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / ".lock").touch()
    _, repositories, _ = sent(export=folder)
    assert repositories["me/sums"].keys() == {"README.md", "config.json"}
    assert words in repositories["me/sums"]["README.md"].decode()


def test_what_is_no_export_is_refused(sent: Callable[..., Any], finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone does not exist"):
        sent(export=tmp_path / "gone")
    shutil.copytree(finished[0] / "patch", tmp_path / "patch")
    with pytest.raises(InputError, match="--export names no exported model"):
        sent(export=tmp_path / "patch")
