import errno
import json
import os
from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.whole import (
    damage,
    remove_leftovers,
    require_regular,
    require_space,
    write_bytes,
    written_whole,
)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a") as folder:
        (folder / "in").mkdir()
        (folder / "in" / "one").write_text("1")
        assert not (tmp_path / "a").exists()
    assert damage(tmp_path / "a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    sha256 = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert manifest == {"files": {"in/one": {"bytes": 1, "sha256": sha256}}}


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a", sealed=False) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(ValueError), written_whole(tmp_path / "a") as folder:
        (folder / "one").write_text("2")
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {"one": "1"}


def test_a_library_that_meets_a_full_disk_is_understood(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, written_whole(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "gone" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["one", "two", "manifest.json"])
def test_every_damage_is_found(tmp_path: Path, name: str) -> None:
    with written_whole(tmp_path / "a") as folder:
        (folder / "one").write_text("12")
        (folder / "two").write_text("345")
    file = tmp_path / "a" / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        # White space in the manifest says nothing.
        if not whole[place : place + 1].isspace():
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert damage(tmp_path / "a") is not None, place
    # The last one ends a line.
    for size in range(len(whole) - 1):
        file.write_bytes(whole[:size])
        assert damage(tmp_path / "a") is not None
    file.unlink()
    assert damage(tmp_path / "a") == f"{name} is missing"


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    for name, what in {"pipe": "a device or a pipe", "folder": "a folder", "device": "a device"}.items():
        with pytest.raises(InputError, match=f"{name} is {what}"):
            write_bytes(tmp_path / name, b"1")
    (tmp_path / "link").symlink_to("file")
    write_bytes(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"1"
    require_regular(tmp_path / "new")


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a" / ".b.12.tmp" / "b").mkdir(parents=True)
    (tmp_path / ".c.json.12.tmp").touch()
    (tmp_path / "d.tmp").touch()
    remove_leftovers(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "d.tmp"]


def test_no_room_gives_both_sizes(tmp_path: Path) -> None:
    words = (
        r"^this needs 1048576\.00 GiB of disk space and \d+\.\d\d GiB are free for .*; free some, or that\.$"
    )
    with pytest.raises(InputError, match=words):
        require_space(tmp_path / "not" / "yet", 2**50, "this", "that")
    require_space(tmp_path, 1, "this", "that")
