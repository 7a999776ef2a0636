"""Files appear whole, after they are on the disk, or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from transformerlm.utils import files


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order is: write beside, flush, rename, flush the folder."""
    told = []
    sync, replace = files.sync, Path.replace
    monkeypatch.setattr(files, "sync", lambda path: (told.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (told.append(("replace", path.name)), replace(path, to))[1])
    files.write_whole(tmp_path / "a.json", "é")
    assert told == [("sync", "a.json.tmp"), ("replace", "a.json.tmp"), ("sync", tmp_path.name)]
    assert (tmp_path / "a.json").read_bytes() == "é".encode()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    """If the disk is full, the error names the file, the old one is unchanged and nothing unfinished is beside it."""
    (tmp_path / "a").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_whole(tmp_path / "a", b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_files_take_their_places_together(tmp_path, monkeypatch):
    """All are flushed before the block, and take their places in order after it."""
    told = []
    sync, replace = files.sync, Path.replace
    monkeypatch.setattr(files, "sync", lambda path: (told.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (told.append(("replace", path.name)), replace(path, to))[1])
    with files.whole_files({tmp_path / "b": "1", tmp_path / "a": b"2"}):
        told.append("block")
    home = ("sync", tmp_path.name)
    assert told == [
        ("sync", "b.tmp"),
        ("sync", "a.tmp"),
        "block",
        ("replace", "b.tmp"),
        home,
        ("replace", "a.tmp"),
        home,
    ]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "2", "b": "1"}


def test_files_that_cannot_all_be_written_leave_what_was_there(tmp_path):
    """An error at one of them, or in the block, changes nothing and leaves nothing."""
    (tmp_path / "a").write_text("old")
    with (
        pytest.raises(FileNotFoundError, match="gone/b"),
        files.whole_files({tmp_path / "a": "1", tmp_path / "gone/b": ""}),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), files.whole_files({tmp_path / "a": "1"}):
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("step", ["replace", "sync"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_files_that_cannot_all_take_their_places_leave_what_was_there(tmp_path, monkeypatch, number, step, links):
    """At whichever step it fails, all files are the old ones, or after the last the new ones; nothing else is there."""
    old, new = {"a": "old a", "c": "old c"}, {"a": "new a", "b": "new b", "c": "new c"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    owner = Path if step == "replace" else files
    original, calls = getattr(owner, step), []

    def fails(path, *to):
        if to or path == tmp_path:
            calls.append(path)
            if len(calls) == number:
                raise OSError(5, "Input/output error")
        return original(path, *to)

    def refuses(path, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(owner, step, fails)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuses)
    contents = {tmp_path / name: text for name, text in new.items()}
    with pytest.raises(OSError, match="Input/output error") as caught, files.whole_files(contents):
        pass
    assert caught.value.filename == str(tmp_path / "abc"[number - 1])
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == (new if (step, number) == ("sync", 3) else old)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
def test_ctrl_c_waits_until_all_files_have_their_places(tmp_path, monkeypatch):
    """Pressed while they take their places, it comes after the last: old and new files are never mixed."""
    (tmp_path / "a").write_text("old")
    replace = Path.replace

    def interrupted(path, to):
        signal.raise_signal(signal.SIGINT)
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.whole_files({tmp_path / "a": "1", tmp_path / "b": "2"}):
        pass
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "1", "b": "2"}


def test_an_unfinished_file_of_another_process_stays(tmp_path, monkeypatch):
    """Once a file has its place, a file with the unfinished name is not ours."""
    move = files.move_into_place

    def move_and_meet(unfinished, path):
        move(unfinished, path)
        unfinished.write_text("another's")

    monkeypatch.setattr(files, "move_into_place", move_and_meet)
    with files.whole_file(tmp_path / "a") as unfinished:
        unfinished.write_text("ours")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "ours", "a.tmp": "another's"}


def test_a_tree_is_flushed_from_its_leaves(tmp_path, monkeypatch):
    """Every file and folder is flushed, contents before their folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("1")
    told = []
    monkeypatch.setattr(files, "sync", lambda path: told.append(path.name))
    files.sync_tree(tmp_path)
    assert told == ["file", "folder", tmp_path.name]


def test_forgetting_changes_nothing(tmp_path, monkeypatch):
    """A file dropped from memory reads as before; if the system cannot drop it, nothing happens."""
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    files.sync(tmp_path / "a")
    files.forget_cached(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    files.forget_cached(tmp_path / "missing")


def test_a_directory_appears_whole(tmp_path):
    """While it is filled it has another name; at the end it takes the place of the one that was there."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with files.whole_directory(tmp_path / "out") as directory:
        (directory / "new").write_text("")
        assert (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_directory_that_cannot_take_its_place_leaves_what_was_there(tmp_path, monkeypatch):
    """If the last step fails, the previous directory is back in its place."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    rename = Path.rename

    def fails(path, target):
        if path.name == "out.tmp":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"), files.whole_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_directory_that_fails_leaves_what_was_there(tmp_path):
    """After an error nothing of the new directory is left, and the leftover of a killed process does not matter."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out.tmp").mkdir()
    with pytest.raises(FileNotFoundError), files.whole_directory(tmp_path / "out") as directory:
        (directory / "nowhere" / "new").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_directory_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """A folder that exists, or can be created, passes; a file in its place and a read-only folder do not."""
    files.check_writable(tmp_path)
    files.check_writable(tmp_path / "new/deep")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a directory, found the file"):
        files.check_writable(tmp_path / "file/out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="expected a directory that can be written to"):
        files.check_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_appears_later_is_waited_for(tmp_path, monkeypatch):
    """What another machine has written may be seen later; what never appears is an error that names it."""
    path = tmp_path / "folder" / "late"
    looks = []

    def slow(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            path.parent.mkdir()
        if len(looks) == 5:
            path.touch()

    monkeypatch.setattr(files.time, "sleep", slow)
    files.wait_for(path)
    assert len(looks) == 5
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 0.0)
    with pytest.raises(FileNotFoundError, match="never: this machine does not see it"):
        files.wait_for(tmp_path / "never")
