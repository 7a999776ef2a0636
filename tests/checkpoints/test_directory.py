"""Checkpoints are found, kept, set aside and pointed to by the step in their names."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.helpers import DAMAGES, FILES, Killed, make_snapshot, two_checkpoints
from tests.cli.commands import call
from transformerlm.checkpoints.directory import (
    list_checkpoints,
    newest_whole,
    point,
    prune,
    remove_leftovers,
    resolve,
    resolve_verified,
    restore_links,
    set_aside,
    step_name,
    step_of,
)
from transformerlm.checkpoints.load import load_model
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import CheckpointError, CheckpointUnreadableError, verify


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_older_checkpoint_used(name, damage, files, tmp_path):
    """A checkpoint with a file that is missing, cut or has one bit flipped is set aside; the one before it is found."""
    older, newer = two_checkpoints(tmp_path, files)
    DAMAGES[damage](newer / name)
    with pytest.raises(CheckpointError):
        load_model(newer)
    warnings: list[str] = []
    assert newest_whole(tmp_path, warn=warnings.append) == older
    assert (tmp_path / "step-00000002.bad").is_dir()
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert warnings[0].endswith("set aside as step-00000002.bad, step-00000001 is used instead")
    assert "\n" not in warnings[0]


def cannot_open(patch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Let the system refuse to open a file, with the error of this number."""
    open_file = Path.open

    def opened(self: Path, *args: Any, **settings: Any) -> Any:
        if self == path:
            raise OSError(number, os.strerror(number), str(self))
        return open_file(self, *args, **settings)

    patch.setattr(Path, "open", opened)


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_now_is_not_damage(name, files, tmp_path, monkeypatch):
    """Too many open files, no permission, a disk that is away: one error that names the file, and nothing is moved."""
    older, newer = two_checkpoints(tmp_path / "checkpoints", files)
    for number in (errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM):
        reason = re.escape(f"{newer / name}: cannot be read: {os.strerror(number)}; that is no damage")
        with monkeypatch.context() as patch:
            cannot_open(patch, newer / name, number)
            for read in (newest_whole, resolve, verify):
                with pytest.raises(CheckpointUnreadableError, match=reason):
                    read(newer if read is verify else newer.parent)
    with monkeypatch.context() as patch:
        cannot_open(patch, newer / name, errno.EMFILE)
        done = call("infer", f"--checkpoint={newer}", "--prompt=Ada", "--device=cpu")
        if not name.startswith("optimizer"):
            assert (done.code, done.stderr.count("\n")) == (1, 1)
            assert f"{newer / name}: cannot be read: {os.strerror(errno.EMFILE)}" in done.stderr
    assert list_checkpoints(newer.parent) == [newer, older]
    cannot_open(monkeypatch, newer / name, errno.EIO)
    assert newest_whole(newer.parent, warn=lambda line: None) == older
    assert not newer.exists()


def test_a_folder_that_cannot_be_listed_is_not_damage(files, tmp_path, monkeypatch):
    """Its files are not missing."""
    _, newer = two_checkpoints(tmp_path, files)
    scan = os.scandir

    def scanned(path: Any) -> Any:
        if Path(path) == newer / "tokenizer":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scanned)
    with pytest.raises(CheckpointUnreadableError, match="tokenizer: cannot be read: Permission denied"):
        newest_whole(tmp_path)


def test_many_damaged_checkpoints_are_kept_apart(files, tmp_path):
    """A second damaged checkpoint of the same step gets its own `.bad` name; none is overwritten."""
    snapshot = make_snapshot(files)
    older = save_checkpoint(tmp_path, 1, snapshot)
    for _ in range(3):
        (save_checkpoint(tmp_path, 2, snapshot) / "state.json").unlink()
        assert newest_whole(tmp_path, warn=lambda line: None) == older
    assert sorted(path.name for path in tmp_path.glob("*.bad*")) == [f"step-00000002.bad{n}" for n in ("", 2, 3)]


def test_damage_to_all_checkpoints_is_refused_each_time(files, tmp_path):
    """Each is named and stays where it is, so that the next start refuses, too; so do those set aside before."""
    for directory in two_checkpoints(tmp_path, files):
        DAMAGES["missing"](directory / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"found .*step-00000002.*step-00000001") as caught:
            newest_whole(tmp_path)
        assert f"to begin anew, remove {tmp_path.parent} or choose another logging.run_name" in str(caught.value)
    for directory in list_checkpoints(tmp_path):
        set_aside(directory)
    with pytest.raises(CheckpointError, match=r"step-00000002\.bad: set aside as damaged before"):
        newest_whole(tmp_path)


def test_another_format_is_refused_and_not_set_aside(files, tmp_path):
    """A checkpoint of a newer version is not damage: it is refused with both numbers and stays where it is."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "format": 3}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 1 or 2, found 3"):
        newest_whole(tmp_path)
    assert directory.is_dir()


def test_an_interrupted_clean_up_leaves_nothing_that_looks_whole(files, tmp_path, monkeypatch):
    """`prune` renames before it removes: stopped half-way, the rest no longer has a checkpoint's name."""
    _, newer = two_checkpoints(tmp_path, files)

    def remove_one_file(directory, **kwargs):
        (Path(directory) / "model.safetensors").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", remove_one_file)
    with pytest.raises(Killed):
        prune(tmp_path, keep=1)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [newer]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def empty_checkpoints(root: Path, steps: list[int]) -> list[Path]:
    """Make directories with the names of checkpoints."""
    directories = [root / step_name(step) for step in steps]
    for directory in directories:
        directory.mkdir(parents=True)
        (directory / "state.json").write_text("{}")
    return directories


@pytest.mark.parametrize("by_link", [True, False], ids=["link", "file"])
def test_prune_keeps_the_newest_and_the_best(by_link, tmp_path, monkeypatch):
    """All but the newest `keep` are removed, except the one that `best` names, by a link or by a file."""
    directories = empty_checkpoints(tmp_path, [1, 2, 3, 4, 5])
    if not by_link:
        monkeypatch.setattr(Path, "symlink_to", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no right")))
    point(tmp_path / "best", directories[1])
    assert (tmp_path / "best").is_symlink() == by_link
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [step_name(n) for n in (2, 4, 5)]


def test_order_is_by_step_not_by_name(tmp_path):
    """Steps beyond eight digits are newer, though their names sort before; other names are not checkpoints."""
    empty_checkpoints(tmp_path, [99_999_999, 100_000_000, 5])
    for name in ("step-00000009.tmp", "step-00000009.bad", "step-9", "other"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100_000_000, 99_999_999, 5]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("by_link", [True, False], ids=["link", "file"])
def test_resolve_takes_every_way_to_name_a_checkpoint(by_link, tmp_path, monkeypatch):
    """A run, its `checkpoints`, one checkpoint, `latest` and `best` all lead to a checkpoint's directory."""
    root = tmp_path / "run" / "checkpoints"
    older, newer = empty_checkpoints(root, [1, 2])
    monkeypatch.setattr("transformerlm.checkpoints.directory.verify", lambda directory, **at: {})
    if not by_link:
        monkeypatch.setattr(Path, "symlink_to", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no right")))
    point(root / "latest", newer)
    point(root / "best", older)
    names = {"run": newer, "run/checkpoints": newer, "run/checkpoints/step-00000001": older}
    for name, expected in (names | {"run/latest": newer, "run/best": older}).items():
        assert resolve(tmp_path / name) == expected
    assert resolve(root / "latest").resolve() == newer.resolve()
    assert resolve(root / "best").resolve() == older.resolve()


def test_a_run_without_validation_has_no_best(tmp_path):
    """`RUN/best` of a run that saved no validation loss is refused in words; a run that is called best is a run."""
    empty_checkpoints(tmp_path / "best" / "checkpoints", [1])
    with pytest.raises(CheckpointError, match="best: expected one checkpoint to be best, found none"):
        resolve(tmp_path / "best" / "best")
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is whole"), pytest.warns(match="older one"):
        resolve(tmp_path / "best")


def test_resolve_passes_over_damage_with_a_warning(files, tmp_path):
    """A reader of a run gets its newest whole checkpoint and a warning that names the damaged one, which stays."""
    older, newer = two_checkpoints(tmp_path, files)
    DAMAGES["missing"](newer / "model.safetensors")
    with pytest.warns(UserWarning, match=r"2: model\.safetensors is missing; step-00000001 is used instead"):
        assert resolve(tmp_path) == older
    assert newer.is_dir()
    DAMAGES["missing"](older / "config.toml")
    with (
        pytest.warns(UserWarning, match="there is no older one"),
        pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"),
    ):
        resolve(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_who_wants_the_weights_alone_finds_all_damage_to_what_is_used(name, damage, files, tmp_path):
    """Every damaged file is found but the optimizer's, which must only be there; nothing is moved."""
    older, newer = two_checkpoints(tmp_path, files)
    DAMAGES[damage](newer / name)
    if name.startswith("optimizer") and damage != "missing":
        assert resolve_verified(tmp_path) == (newer, verify(newer, weights_only=True))
        assert resolve_verified(newer)[1]["step"] == 2
        return
    with pytest.raises(CheckpointError):
        resolve_verified(newer)
    with pytest.warns(UserWarning, match="step-00000001 is used instead"):
        assert resolve_verified(tmp_path) == (older, verify(older))
    assert newer.is_dir()


def test_resolve_says_what_it_found_instead(tmp_path):
    """A missing directory and one without checkpoints get different errors, each in one line."""
    with pytest.raises(CheckpointError, match="no such checkpoint or run directory"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found neither"):
        resolve(tmp_path)


def test_moving_a_link_is_one_rename(tmp_path):
    """`point` replaces an existing link, even a dangling one, without a moment at which there is none."""
    first, second = empty_checkpoints(tmp_path, [1, 2])
    point(tmp_path / "latest", first)
    shutil.rmtree(first)
    point(tmp_path / "latest", second)
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_directory_in_the_place_of_a_link_gives_way(tmp_path):
    """`point` sets aside what a copy has put in place of the link, and leaves nothing temporary."""
    (target,) = empty_checkpoints(tmp_path, [1])
    (tmp_path / "best").mkdir()
    point(tmp_path / "best", target)
    assert (tmp_path / "best").resolve() == target.resolve()
    assert (tmp_path / "best.bad").is_dir()
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("own", ["whole", "damaged", "missing"])
def test_copied_links_become_links_again(own, files, tmp_path):
    """A copy that followed links has directories instead of links: one whole copy of each step stays."""
    for directory in two_checkpoints(tmp_path, files):
        link = tmp_path / ("best" if directory.name.endswith("1") else "latest")
        link.unlink(missing_ok=True)
        shutil.copytree(directory, link)
    if own == "damaged":
        DAMAGES["missing"](tmp_path / "step-00000001/model.safetensors")
    elif own == "missing":
        shutil.rmtree(tmp_path / "step-00000001")
    restore_links(tmp_path)
    assert (tmp_path / "best").is_symlink()
    assert (tmp_path / "latest").is_symlink()
    assert verify((tmp_path / "best").resolve())["step"] == 1
    names = ["best", "latest", "step-00000001", "step-00000001.bad", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        name for name in names if own == "damaged" or name[-1] != "d"
    ]
