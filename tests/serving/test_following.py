"""Which checkpoint is taken over next, in runs whose checkpoints are two small files each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.serving.helpers import engine_settings
from transformerlm.checkpoints.directory import point
from transformerlm.checkpoints.validation import CheckpointError
from transformerlm.serving.checkpoint_loader import CheckpointLoader
from transformerlm.serving.following import CheckpointNotNowError, Following, checkpoints_of, identity


def save(root: Path, step: int, content: str = "whole") -> Path:
    """Write what looks like a checkpoint; `load` below takes it if its content is whole."""
    directory = root / f"step-{step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "weights").write_text(content)
    (directory / "state.json").write_text("{}")
    return directory


def load(directory: Path) -> str:
    """Return the name of a whole checkpoint."""
    try:
        content = (directory / "weights").read_text()
    except OSError:
        raise CheckpointError("gone") from None
    if content == "pruned meanwhile":
        shutil.rmtree(directory)
    if content != "whole":
        raise CheckpointError(content)
    return directory.name


@pytest.fixture
def skipped() -> list[str]:
    """Return the list of what was told as skipped."""
    return []


def following(root: Path, skipped: list[str], which: str = "newest") -> Following[str]:
    """Follow the checkpoints in `root`."""
    return Following(root, which, load=load, skip=lambda name, reason: skipped.append(f"{name}: {reason}"))  # type: ignore[arg-type]


def test_nothing_is_taken_over_while_there_is_no_room(tmp_path, skipped):
    """As long as many old models are at work, another one would only take more memory; later the newest comes."""
    save(tmp_path / "checkpoints", 1)
    room, taken = [False], []
    settings = engine_settings(tmp_path)
    loader = CheckpointLoader(settings, tell=lambda told: None, put=taken.append, may_take_over=lambda: room[0])
    loader._served = SimpleNamespace(facts=SimpleNamespace(checkpoint="before"))
    loader._following = following(tmp_path / "checkpoints", skipped)
    loader._look()
    assert taken == []
    room[0] = True
    loader._served = SimpleNamespace(facts=SimpleNamespace(checkpoint="before"))
    loader.names = list
    loader._look()
    assert [opened.model for opened in taken] == ["step-00000001"]


def test_each_new_checkpoint_is_taken_once(tmp_path, skipped):
    """Nothing comes while there is none, then the newest of several, then nothing until there is another."""
    look = following(tmp_path / "checkpoints", skipped).look
    assert look() is None
    save(tmp_path / "checkpoints", 1)
    save(tmp_path / "checkpoints", 2)
    assert look() == "step-00000002"
    assert look() is None
    save(tmp_path / "checkpoints", 100_000_000)
    save(tmp_path / "checkpoints", 3)
    assert look() == "step-100000000"
    assert look() is None
    assert not skipped


def test_what_is_not_whole_is_told_once_and_tried_again_when_it_changes(tmp_path, skipped):
    """The server stays with what it has; a copy that goes on and a file that is repaired are noticed."""
    look = following(tmp_path, skipped).look
    save(tmp_path, 1)
    assert look() == "step-00000001"
    save(tmp_path, 2, "damaged")
    assert look() is look() is None
    save(tmp_path, 2, "damaged, another way")
    assert look() is None
    assert skipped == ["step-00000002: damaged"]
    save(tmp_path, 2)
    assert look() == "step-00000002"
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "weights").write_text("whole")  # a copy whose state.json comes last
    assert look() is None
    assert len(skipped) == 1


def test_what_cannot_be_read_now_is_told_once_and_tried_again(tmp_path, skipped):
    """Less and less often, though none of its files changes; damage that is found then is told, too."""
    tries: list[int] = []
    looks = [0]

    def load_later(directory: Path) -> str:
        tries.append(looks[0])
        if len(tries) < 4:
            raise CheckpointNotNowError("no memory")
        return load(directory)

    found = Following(tmp_path, "newest", load=load_later, skip=lambda name, why: skipped.append(f"{name}: {why}"))

    def look_eight_times() -> list[str | None]:
        looks[0], results = 0, []
        for _ in range(8):
            looks[0] += 1
            results.append(found.look())
        return results

    save(tmp_path, 1)
    assert look_eight_times() == [None] * 7 + ["step-00000001"]
    assert tries == [1, 2, 4, 8]
    assert skipped == ["step-00000001: no memory; it is tried again"]
    tries.clear()
    save(tmp_path, 2, "damaged")
    assert look_eight_times() == [None] * 8
    assert tries == [1, 2, 4, 8]
    assert skipped[1:] == ["step-00000002: no memory; it is tried again", "step-00000002: damaged"]


def test_a_newer_one_is_taken_where_the_newest_is_damaged(tmp_path, skipped):
    """With 3 damaged, 2 is better than 1; 1 again would be a step back, also when 2 has been removed."""
    look = following(tmp_path, skipped).look
    save(tmp_path, 1)
    assert look() == "step-00000001"
    second = save(tmp_path, 2)
    save(tmp_path, 3, "damaged")
    assert look() == "step-00000002"
    shutil.rmtree(second)
    assert look() is None


def test_one_that_is_pruned_while_it_is_read_is_no_damage(tmp_path, skipped):
    """The next one is taken, and nothing is told."""
    look = following(tmp_path, skipped).look
    save(tmp_path, 1)
    save(tmp_path, 2, "pruned meanwhile")
    assert look() == "step-00000001"
    save(tmp_path, 3, "pruned meanwhile")
    assert look() is None
    assert not skipped


def test_a_run_that_went_back_or_began_anew_is_followed(tmp_path, skipped):
    """What is newest counts, with a lower step too, or the same one with other files."""
    look = following(tmp_path, skipped).look
    directory = save(tmp_path, 20)
    assert look() == "step-00000020"
    directory.rename(tmp_path / "step-00000020.bad")
    save(tmp_path, 10)
    assert look() == "step-00000010"
    shutil.rmtree(tmp_path / "step-00000010")
    os.utime(save(tmp_path, 10) / "weights", (1, 1))
    assert look() == "step-00000010"
    assert look() is None


def test_the_best_one_is_followed_by_its_link(tmp_path, skipped):
    """A newer checkpoint is nothing to it until `best` points to it; nor is a link to nothing."""
    look = following(tmp_path, skipped, "best").look
    first = save(tmp_path, 1)
    assert look() is None
    point(tmp_path / "best", first)
    assert look() == "step-00000001"
    second = save(tmp_path, 2)
    assert look() is None
    point(tmp_path / "best", second)
    assert look() == "step-00000002"
    shutil.rmtree(second)
    assert look() is None
    assert not skipped


def test_the_best_one_of_a_copied_run_is_a_folder(tmp_path, skipped):
    """`cp -rL` and `scp -r` make folders of links; one that is copied again is taken again."""
    look = following(tmp_path, skipped, "best").look
    save(tmp_path, 1).rename(tmp_path / "best")
    assert look() == "best"
    assert look() is None
    (tmp_path / "best/state.json").write_text('{"copied": "again"}')
    assert look() == "best"
    assert not skipped


def test_the_folder_is_found_from_each_way_to_name_a_run(tmp_path):
    """A run, its best one and one checkpoint name the same folder, which need not be there; a lone checkpoint none."""
    root = tmp_path / "run" / "checkpoints"
    for path in (tmp_path / "run", tmp_path / "run" / "best", root, root / "best", root / "latest"):
        assert checkpoints_of(path) == root
    directory = save(root, 3)
    assert checkpoints_of(directory) == root
    lone = directory.rename(tmp_path / "lone")
    with pytest.raises(ValueError, match="expected a run to follow, found a checkpoint outside of one"):
        checkpoints_of(lone)


def test_a_checkpoint_has_another_identity_when_a_file_was_written(tmp_path):
    """One byte more, or the same bytes later, make it another one; without state.json it has none."""
    directory = save(tmp_path, 1)
    found = [identity(directory)]
    (directory / "weights").write_text("wholes")
    found.append(identity(directory))
    os.utime(directory / "weights", (1, 1))
    found.append(identity(directory))
    assert len(set(found)) == 3
    (directory / "state.json").unlink()
    assert identity(directory) is None
    assert identity(tmp_path / "none") is None
