"""A token file is appended in parts, and at the end it is whole or does not exist."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from transformerlm.token_files.sidecar import sidecar_path
from transformerlm.token_files.writer import TokenFileWriter, publish
from transformerlm.utils.lock import try_lock

UINT16 = np.dtype(np.uint16)


@pytest.mark.parametrize("num_tokens", [0, 1, 10, 12_345])
def test_appended_parts_are_one_array(tmp_path: Path, num_tokens: int) -> None:
    """numpy reads the file as the array of all parts, mapped or not, whatever the number of digits of its length."""
    ids = np.arange(num_tokens, dtype=np.uint16)
    with TokenFileWriter(tmp_path / "deep/train.npy", UINT16) as writer:
        for start in range(0, num_tokens, 100):
            writer.append(ids[start : start + 100])
        publish([writer], [{"bytes": 7}])
    assert np.array_equal(np.load(tmp_path / "deep/train.npy", mmap_mode="r" if num_tokens else None), ids)
    assert json.loads(sidecar_path(tmp_path / "deep/train.npy").read_text())["tokens"] == num_tokens


def test_nothing_stays_of_what_was_not_published(tmp_path: Path) -> None:
    """Leaving the block without publishing, as any exception does, removes the unfinished file."""
    writer = TokenFileWriter(tmp_path / "train.npy", UINT16)
    with writer:
        writer.append(np.array([0], dtype=np.uint16))
        assert os.listdir(tmp_path) == [".train.npy.tmp"]
    assert os.listdir(tmp_path) == []


def test_what_a_killed_build_left_is_taken_over(tmp_path: Path) -> None:
    """An unfinished file from before neither stops a build nor gets into it."""
    (tmp_path / ".train.npy.tmp").write_bytes(b"x" * 1000)
    with TokenFileWriter(tmp_path / "train.npy", UINT16) as writer:
        writer.append(np.array([5], dtype=np.uint16))
        publish([writer], [{}])
    assert np.load(tmp_path / "train.npy").tolist() == [5]


def test_two_builds_of_one_file_are_refused(tmp_path: Path) -> None:
    """The second writer is told of the first, and does not touch its file."""
    pytest.importorskip("fcntl")
    with TokenFileWriter(tmp_path / "train.npy", UINT16) as first:
        first.append(np.array([5], dtype=np.uint16))
        with (
            pytest.raises(FileExistsError, match="found another one writing it"),
            TokenFileWriter(tmp_path / "train.npy", UINT16),
        ):
            pass
        publish([first], [{}])
    assert np.load(tmp_path / "train.npy").tolist() == [5]


def test_the_sidecar_comes_last_and_the_old_one_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the steps leaves a file without a sidecar, never beside another file's."""
    path = tmp_path / "train.npy"
    sidecar_path(path).write_text("old")
    with TokenFileWriter(path, UINT16) as writer:

        def crash() -> None:
            assert not sidecar_path(path).exists()
            raise OSError("pulled the plug")

        monkeypatch.setattr(writer, "rename", crash)
        with pytest.raises(OSError, match="pulled the plug"):
            publish([writer], [{}])
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_at_the_sidecar_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old ids, offsets and sidecar are replaced when all that is new is on the disk, and not before."""
    path = tmp_path / "train.npy"
    with TokenFileWriter(path, UINT16, separator_id=5) as writer:
        writer.append(np.array([7, 5], dtype=np.uint16))
        publish([writer], [{}])
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:3])
        raise OSError(28, "No space left on device")

    with TokenFileWriter(path, UINT16, separator_id=5) as writer:
        writer.append(np.array([8, 9, 5], dtype=np.uint16))
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left") as caught:
            publish([writer], [{}])
    assert caught.value.filename == str(sidecar_path(path))
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_a_build_removes_its_own_unfinished_file_alone(tmp_path: Path) -> None:
    """The next build of the same file may begin as soon as this one's ids have their name."""
    path = tmp_path / "train.npy"
    with ExitStack() as later:
        with TokenFileWriter(path, UINT16) as first:
            first.append(np.array([5], dtype=np.uint16))
            publish([first], [{}])
            second = later.enter_context(TokenFileWriter(path, UINT16))
        second.append(np.array([6], dtype=np.uint16))
        publish([second], [{}])
    assert np.load(path).tolist() == [6]


def test_an_unfinished_file_is_removed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no other build can take it over and lose it."""
    pytest.importorskip("fcntl")
    unlink = Path.unlink
    taken: list[bool] = []

    def take_over(path: Path, **options: bool) -> None:
        with path.open("r+b") as file:
            taken.append(try_lock(file, path))
        unlink(path, **options)

    with TokenFileWriter(tmp_path / "train.npy", UINT16):
        monkeypatch.setattr(Path, "unlink", take_over)
    assert taken == [False]
    assert os.listdir(tmp_path) == []
