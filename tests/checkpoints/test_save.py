"""Checkpoints are whole or do not exist, whenever a save stops."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.checkpoints.helpers import FILES, Killed, flip_bit, make_snapshot
from transformerlm.checkpoints import save, side_by_side, validation
from transformerlm.checkpoints.directory import (
    list_checkpoints,
    newest_whole,
    prune,
    remove_leftovers,
    step_of,
)
from transformerlm.checkpoints.load import load_model
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.tensor_files import TensorFileWriter
from transformerlm.checkpoints.validation import verify
from transformerlm.utils import files as disk


def test_directory_is_self_contained_and_holds_no_pickle(files, tmp_path):
    """A checkpoint holds exactly the documented files, is complete when moved, and has no pickle or zip."""
    directory = save_checkpoint(tmp_path / "here", 2, make_snapshot(files)).rename(tmp_path / "elsewhere")
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert names == sorted(FILES)
    assert all((directory / name).read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04") for name in names)
    load_model(directory)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_that_the_umask_gives(mask, files, tmp_path):
    """Every file of a checkpoint, tensors included, can be read by those whom the user's umask allows."""
    old = os.umask(mask)
    try:
        directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    finally:
        os.umask(old)
    assert {(directory / name).stat().st_mode & 0o777 for name in FILES} == {0o666 & ~mask}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the file-system operation after the `number`-th raise: writing, flushing, renaming, linking."""
    left = [number]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (TensorFileWriter, "_begin"),
        (TensorFileWriter, "finish"),
        (save, "file_sha256"),
        (side_by_side, "file_sha256"),
        (validation, "file_sha256"),
        *((Path, name) for name in ("write_text", "mkdir", "rename", "replace", "symlink_to", "unlink")),
    ]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(
        os, "fsync", counted(lambda descriptor: None)
    )  # the real call is slow and makes no difference here


@pytest.mark.parametrize("cleans_up", [True, False], ids=["exception", "kill"])
def test_a_save_stopped_at_any_operation_leaves_a_whole_checkpoint(cleans_up, files, tmp_path, monkeypatch):
    """Whichever operation is the last, everything with a checkpoint's name is whole, and the older one still exists."""
    snapshot, number, finished = make_snapshot(files), 0, False
    while not finished:
        root = tmp_path / str(number)
        older = save_checkpoint(root, 1, snapshot)
        with monkeypatch.context() as patch:
            if not cleans_up:
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            interrupt_after(patch, number)
            try:
                save_checkpoint(root, 2, snapshot)
                finished = True
            except Killed:
                pass
        named = list_checkpoints(root)
        assert older in named
        for directory in named:
            verify(directory)
        remove_leftovers(root)
        assert not [path.name for path in root.iterdir() if ".tmp" in path.name]
        assert newest_whole(root) == named[0]
        number += 1
    assert number > 20  # there were that many places to stop at


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sigkill_at_any_moment_leaves_whole_checkpoints(files, tmp_path):
    """A process that saves without pause and is killed at random moments never leaves a damaged checkpoint behind."""
    snapshot, rng = make_snapshot(files), random.Random(0)
    save_checkpoint(tmp_path, 1, snapshot)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            step = step_of(list_checkpoints(tmp_path)[0])
            while True:
                step += 1
                save_checkpoint(tmp_path, step, snapshot)
                prune(tmp_path, 2)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = list_checkpoints(tmp_path)
        assert found
        for directory in found:
            verify(directory)
        remove_leftovers(tmp_path)


def test_everything_is_durable_before_the_name_appears(files, tmp_path, monkeypatch):
    """Files and directories are flushed before the rename, parents after it; then all is read back, then announced."""
    events: list[tuple[str, str]] = []
    sync, rename, real_point, real_verify = disk.sync, Path.rename, save.point, save.verify
    monkeypatch.setattr(disk, "sync", lambda path: (events.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append(("rename", path.name)), rename(path, to))[1])
    monkeypatch.setattr(
        save, "verify", lambda path, **at: (events.append(("verify", path.name)), real_verify(path, **at))[1]
    )
    monkeypatch.setattr(save, "point", lambda link, to: (events.append(("point", link.name)), real_point(link, to)))
    root = tmp_path / "checkpoints"
    save_checkpoint(root, 2, make_snapshot(files))
    renamed = events.index(("rename", "step-00000002.tmp"))
    before = {name for kind, name in events[:renamed] if kind == "sync"}
    assert before >= {Path(name).name for name in FILES} | {"tokenizer", "step-00000002.tmp"}
    after = [("sync", name) for name in ("checkpoints", tmp_path.name, tmp_path.parent.name)]
    assert events[renamed + 1 :] == [*after, ("verify", "step-00000002"), ("point", "latest")]


def test_a_full_disk_raises_and_leaves_nothing_behind(files, tmp_path, monkeypatch):
    """If a write fails, the error reaches the caller, the half-written directory is removed, and older ones stay."""
    snapshot = make_snapshot(files)
    older = save_checkpoint(tmp_path, 1, snapshot)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFileWriter, "_append", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, snapshot)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", older.name]


def test_what_the_disk_does_not_give_back_is_not_announced(files, tmp_path, monkeypatch):
    """A save that reads back differently is set aside, and the one before stays the newest."""
    snapshot = make_snapshot(files)
    older = save_checkpoint(tmp_path, 1, snapshot)
    rotten = "model.safetensors"
    monkeypatch.setattr(disk, "forget_cached", lambda path: flip_bit(path) if path.name == rotten else None)
    with pytest.raises(
        OSError, match=r"model\.safetensors is damaged.*does not give back.*older checkpoints are whole"
    ):
        save_checkpoint(tmp_path, 2, snapshot)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", older.name, "step-00000002.bad"]
    assert (tmp_path / "latest").resolve() == older.resolve()
    assert newest_whole(tmp_path) == older


def test_saving_a_step_again_sets_the_old_one_aside(files, tmp_path):
    """A directory that already has the name is never overwritten."""
    first = save_checkpoint(tmp_path, 2, make_snapshot(files))
    (first / "note.txt").write_text("mine")
    again = save_checkpoint(tmp_path, 2, make_snapshot(files))
    verify(again)
    assert not (again / "note.txt").exists()
    assert (tmp_path / "step-00000002.bad" / "note.txt").exists()
