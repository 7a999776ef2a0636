"""Behaviour of machine code on disk: only what this user has kept, whole and for this key, comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transformerlm.utils.machine_code import (
    MachineCode,
    can_keep,
    code_folder,
    environment_key,
    keep_code,
    read_code,
)

KEY = "0123" * 16
CODE = MachineCode("a_function", bytes(range(256)) + b"\n\n")

only_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such owners and permissions")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file with code, in a folder that was made for it."""
    path = tmp_path / "folder" / "name.code"
    keep_code(path, KEY, CODE)
    return path


def test_what_is_kept_comes_back(kept: Path) -> None:
    """Symbol and code are those that were kept, and nothing else is in the folder."""
    assert read_code(kept, KEY) == CODE
    assert os.listdir(kept.parent) == [kept.name]


def test_a_damaged_or_foreign_file_is_not_used(kept: Path) -> None:
    """A byte that changed anywhere, a cut, more bytes, or another key: nothing comes back."""
    data = kept.read_bytes()
    for place in range(0, len(data), 3):
        kept.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert read_code(kept, KEY) is None, place
    for other in (b"", data[:40], data[:-1], data + b"x"):
        kept.write_bytes(other)
        assert read_code(kept, KEY) is None
    kept.write_bytes(data)
    assert read_code(kept, "4567" * 16) is None
    assert read_code(kept, KEY) == CODE


@only_posix
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_not_used(kept: Path, mode: int) -> None:
    """Neither a file nor a folder that the group or everybody may write is trusted; both are made for their owner."""
    for path in (kept, kept.parent):
        before = path.stat().st_mode
        assert before & 0o077 == 0
        path.chmod(before | mode)
        assert read_code(kept, KEY) is None
        path.chmod(before)
    assert read_code(kept, KEY) == CODE


@only_posix
def test_what_others_may_read_is_used(kept: Path) -> None:
    """So root may compile for all users of an image and then let them read it, by `chmod -R go+rX`."""
    kept.parent.chmod(0o755)
    kept.chmod(0o644)
    assert read_code(kept, KEY) == CODE


@only_posix
def test_what_belongs_to_others_is_not_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another user than root is not trusted."""
    facts = os.stat_result([*kept.stat()[:4], 12345, *kept.stat()[5:]])
    monkeypatch.setattr(Path, "stat", lambda path: facts)
    assert read_code(kept, KEY) is None


@only_posix
def test_a_pipe_is_not_read(kept: Path) -> None:
    """A pipe at the file's place does not stop the process."""
    kept.unlink()
    os.mkfifo(kept, 0o600)
    assert read_code(kept, KEY) is None


def test_what_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    """A file where the folder should be costs the cache, and nothing fails."""
    (tmp_path / "folder").touch()
    keep_code(tmp_path / "folder" / "name.code", KEY, CODE)
    assert read_code(tmp_path / "folder" / "name.code", KEY) is None


def test_without_a_home_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody knows a user's home, no folder named `~` appears in the present one."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    path = code_folder() / "name.code"
    keep_code(path, KEY, CODE)
    assert read_code(path, KEY) is None
    assert os.listdir(tmp_path) == []


def test_code_that_nobody_reads_goes_after_months(kept: Path) -> None:
    """It is deleted when other code is kept; code that is in use stays, and so does a stranger's file."""
    used, stranger = kept.with_name("used.code"), kept.with_name("notes.txt")
    keep_code(used, KEY, CODE)
    stranger.touch()
    for path in (kept, used, stranger):
        os.utime(path, (0, 0))
    assert read_code(used, KEY) == CODE
    keep_code(kept.with_name("new.code"), KEY, CODE)
    assert sorted(os.listdir(kept.parent)) == ["new.code", "notes.txt", "used.code"]


def test_the_key_changes_with_source_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another source or another option of numba is another key; the place of the cache is not."""
    pytest.importorskip("numba")
    key = environment_key.__wrapped__
    (tmp_path / "a.py").write_text("1")
    first = key(tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert key(tmp_path) == first
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert key(tmp_path) != first
    monkeypatch.delenv("NUMBA_OPT")
    (tmp_path / "a.py").write_text("2")
    assert key(tmp_path) != first


def test_whether_code_can_be_kept_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can where a folder may be made; it cannot below a file."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new" / "folder"))
    assert can_keep()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert not can_keep()
    (tmp_path / "shared" / "transformerlm").mkdir(parents=True, mode=0o775)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "shared"))
    (tmp_path / "shared" / "transformerlm").chmod(0o755)
    assert can_keep()
    if os.name != "nt":  # which has no such permissions
        (tmp_path / "shared" / "transformerlm").chmod(0o775)
        assert not can_keep()  # others could have written what is there, so it is never read
