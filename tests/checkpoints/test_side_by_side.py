"""Checkpoints that several ranks write and read: the same bytes from any number of them, and one result on all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.helpers import DAMAGES
from tests.checkpoints.sharded import MAX_FILE_BYTES, Training, own_part, whole_training
from tests.checkpoints.storages import StorageCounter
from tests.distributed.ranks import run_ranks
from tests.small_disk import files_of_at_most
from tests.training.tiny_run import TinyFiles
from transformerlm.checkpoints import save as checkpoints_save
from transformerlm.checkpoints import validation
from transformerlm.checkpoints.directory import newest_whole
from transformerlm.checkpoints.load import load_optimizer, load_weights
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.tensor_files import TensorFileWriter
from transformerlm.checkpoints.validation import CheckpointError, CheckpointNotSharedError, verify
from transformerlm.distributed import owners
from transformerlm.distributed.world import World, gather_text
from transformerlm.utils import files as disk

HEADERS_BYTES = 2_000  # of a file that a limit of its tensors' bytes does not count
# Ranks, and how many of them share one copy.
SETTINGS = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "4": (4, 4), "2x2": (4, 2)}


def prepare_rank() -> None:
    """Cut what travels into small pieces, and do not wait for the disk, which makes no difference here."""
    owners.BATCH_BYTES = 3_000
    os.fsync = lambda descriptor: None


def save(root: Path, own: Training, files: TinyFiles, world: World, *, shard_size: int, step: int = 1) -> Path:
    """Save this rank's part of a state in files of `MAX_FILE_BYTES`."""
    return save_checkpoint(
        root, step, own.snapshot(files), world=world, shard_size=shard_size, max_file_bytes=MAX_FILE_BYTES
    )


def write_and_read(world: World, names: list[str], files: TinyFiles, root: Path) -> None:
    """Save the state in each of these settings; load what one rank has saved, compare it, and save it again."""
    prepare_rank()
    whole = whole_training(files)
    for name in names:
        shard_size = SETTINGS[name][1]
        own = own_part(whole, world, shard_size)
        save(root / name, own, files, world, shard_size=shard_size)
        loaded = own_part(whole, world, shard_size, empty=True)
        source = root / "1" / "step-00000001"
        load_weights(loaded.weights, source)
        load_optimizer(loaded.optimizer, source, verify(source, world=world), rows=loaded.rows())
        torch.testing.assert_close(loaded.tensors(), own.tensors(), rtol=0, atol=0)
        save(root / f"again-{name}", loaded, files, world, shard_size=shard_size)


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file by name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_any_ranks_write_the_same_bytes_which_any_ranks_read(files, tmp_path, monkeypatch):
    """1, 2, 3, 4 and 2x2 ranks write one state, byte for byte the same, and each reads what one rank wrote.

    As the bytes are the same, each reads what any of them wrote, too.
    """
    monkeypatch.setattr(owners, "BATCH_BYTES", owners.BATCH_BYTES)
    monkeypatch.setattr(os, "fsync", os.fsync)
    write_and_read(World(), ["1"], files, tmp_path)
    for world_size, names in ((2, ["2"]), (3, ["3"]), (4, ["4", "2x2"])):
        run_ranks(write_and_read, world_size, names, files, tmp_path)
    first = contents(tmp_path / "1" / "step-00000001")
    assert sum(name.endswith(".safetensors") for name in first) > 10
    assert {"model.safetensors.index.json", "optimizer.safetensors.index.json"} <= first.keys()
    for name in SETTINGS:
        assert contents(tmp_path / name / "step-00000001") == first, name
        assert contents(tmp_path / f"again-{name}" / "step-00000001") == first, name


# --- what one rank cannot do -----------------------------------------------------------------------------------------

# Which rank fails, and in what.
FAULTS: dict[str, tuple[int, Any, str]] = {
    "makes the directory": (0, Path, "mkdir"),
    "opens a file": (1, TensorFileWriter, "_begin"),
    "writes tensors": (2, TensorFileWriter, "_append"),
    "flushes a file": (1, disk, "sync"),
    "writes the rest": (0, checkpoints_save, "_write_facts"),
    "flushes all": (0, disk, "sync_tree"),
    "renames the directory": (0, Path, "rename"),
}


def fail_in_each_way(world: World, files: TinyFiles, root: Path) -> dict[str, tuple[str, list[str]]]:
    """Save while one rank cannot do something; return what this rank is told, and what is there afterwards."""
    prepare_rank()
    own = own_part(whole_training(files), world, world.world_size)
    save(root, own, files, world, shard_size=world.world_size)
    told = {}
    for name, (rank, owner, attribute) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                patch.setattr(owner, attribute, _no_space)
            told[name] = _refusal(root, own, files, world)
    with files_of_at_most(10_000) if world.rank == 1 else nullcontext():
        told["has a small disk"] = _refusal(root, own, files, world)
    first = own.weights["few_rows"]
    other = replace(own, weights={**own.weights, "few_rows": replace(first, local=first.local.double())})
    told["has other tensors"] = _refusal(root, other if world.rank == 1 else own, files, world)
    if world.rank == 2:
        validation.file_sha256 = lambda path: "0" * 64
    told["reads back"] = _refusal(root, own, files, world)
    return told


def _no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _refusal(root: Path, own: Training, files: TinyFiles, world: World) -> tuple[str, list[str]]:
    with pytest.raises(OSError, match="older checkpoints are whole") as caught:
        save(root, own, files, world, shard_size=world.world_size, step=2)
    gather_text("", world)
    names = sorted(path.name for path in root.iterdir())
    gather_text("", world)
    return str(caught.value), names


def test_what_one_rank_cannot_do_is_one_error_on_all(files, tmp_path):
    """All ranks are told of it, nothing that looks whole is left, and the older checkpoint is whole."""
    reasons = dict.fromkeys(FAULTS, "No space left on device")
    reasons["has a small disk"] = "File too large"
    reasons["has other tensors"] = "expected the same names, dtypes and shapes of tensors on all ranks"
    reasons["reads back"] = "does not give back what was written: set aside as"
    for rank, told in enumerate(run_ranks(fail_in_each_way, 3, files, tmp_path)):
        for name, reason in reasons.items():
            message, names = told[name]
            assert reason in message, (rank, name)
            bad = ["step-00000002.bad"] if name == "reads back" else []
            assert names == ["latest", "step-00000001", *bad], (rank, name)
    assert newest_whole(tmp_path) == tmp_path / "step-00000001"


# --- damage ----------------------------------------------------------------------------------------------------------


def find_whole(world: World, root: Path) -> list[tuple[str, list[str]]]:
    """Damage the newer of two checkpoints in each way; return what this rank takes then, and rank 0's warnings."""
    found = []
    for name, damage in DAMAGES.items():
        for file in ("model-00002-of-00005.safetensors", "optimizer.safetensors.index.json", "state.json"):
            if world.rank == 0:
                shutil.rmtree(root / "step-00000002", ignore_errors=True)
                shutil.copytree(root / "step-00000001", root / "step-00000002")
                damage(root / "step-00000002" / file)
            gather_text("", world)
            warnings: list[str] = []
            newest = newest_whole(root, warn=warnings.append, world=world)
            found.append((f"{name} {file} {newest.name}", [one for one in warnings if file in one]))
            gather_text("", world)
    return found


def test_all_ranks_notice_damage_and_use_the_older_checkpoint(files, tmp_path):
    """Whichever rank reads the damaged file, all take the older checkpoint, and rank 0 says why."""
    save(tmp_path, whole_training(files), files, World(), shard_size=1)
    first, *others = run_ranks(find_whole, 3, tmp_path)
    assert len(first) == 3 * len(DAMAGES)
    assert all(text.endswith("step-00000001") and len(warnings) == 1 for text, warnings in first)
    assert others == [[(text, []) for text, _ in first]] * 2


def read_with_one_rank_short_of_files(world: World, root: Path) -> str:
    """Let rank 2 meet a limit of open files, while rank 1 finds damage; return what this rank is told."""
    if world.rank == 2:
        validation.file_sha256 = _no_file
    with pytest.raises(OSError, match="Too many open files") as caught:
        newest_whole(root, world=world)
    return str(caught.value)


def _no_file(path: Path) -> str:
    raise OSError(errno.EMFILE, "Too many open files", str(path))


def test_no_rank_goes_on_without_one_that_cannot_read_now(files, tmp_path):
    """All end with that rank's error, which names the file, and not even a damaged checkpoint is set aside."""
    for step in (1, 2):
        save(tmp_path, whole_training(files), files, World(), shard_size=1, step=step)
    DAMAGES["flipped"](tmp_path / "step-00000002" / "model-00001-of-00005.safetensors")
    first, *others = run_ranks(read_with_one_rank_short_of_files, 3, tmp_path)
    assert re.search(r"step-00000002/\S+: cannot be read: Too many open files; that is no damage", first)
    assert others == [first] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def look_elsewhere(world: World, root: Path) -> list[str]:
    """Let rank 2 look into another directory than the others, and return what this rank is told."""
    disk.VISIBLE_SECONDS = 0.3
    told = []
    for other in ("none", "another"):
        with pytest.raises(CheckpointNotSharedError) as caught:
            newest_whole(root / (other if world.rank == 2 else "here"), world=world)
        told.append(str(caught.value))
    return told


def test_a_directory_that_not_all_ranks_see_is_not_damage(files, tmp_path):
    """If a rank sees no checkpoint or another one, all refuse to go on, and nothing is set aside."""
    for place, tokens in (("here", 7), ("another", 8)):
        snapshot = whole_training(files).snapshot(files)
        save_checkpoint(tmp_path / place, 1, replace(snapshot, state={"tokens": tokens}))
    for none, another in run_ranks(look_elsewhere, 3, tmp_path):
        assert "none/step-00000001/state.json: this machine does not see it, but rank 0 does: expected all" in none
        assert "expected the same checkpoint on all ranks, found several" in another
    for place in ("here", "another"):
        assert sorted(path.name for path in (tmp_path / place).iterdir()) == ["latest", "step-00000001"]


def test_damage_to_any_of_several_files_is_noticed(files, tmp_path):
    """Each file that is flipped, cut, zeroed or missing is noticed, and named."""
    good = save(tmp_path, whole_training(files), files, World(), shard_size=1)
    names = list(contents(good))
    assert len(names) > 16
    for name in names:
        for damage in DAMAGES.values():
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(good, tmp_path / "copy")
            damage(tmp_path / "copy" / name)
            with pytest.raises(CheckpointError, match=Path(name).name):
                verify(tmp_path / "copy")


# --- memory ----------------------------------------------------------------------------------------------------------


def count_memory(world: World, files: TinyFiles, root: Path) -> dict[str, int]:
    """Save and load a part, and return how many bytes of tensors that took beside those that are there anyway."""
    prepare_rank()
    whole = whole_training(files)
    own = own_part(whole, world, world.world_size)
    with StorageCounter(list(own.tensors().values())) as saving:
        directory = save(root, own, files, world, shard_size=world.world_size)
    loaded = own_part(whole, world, world.world_size, empty=True)
    with StorageCounter(list(loaded.tensors().values())) as loading:
        load_weights(loaded.weights, directory)
        load_optimizer(loaded.optimizer, directory, verify(directory, world=world), rows=loaded.rows())
    state = loaded.num_bytes() - sum(rows.local.nbytes for rows in loaded.weights.values())
    return {"saving": saving.peak, "loading": loading.peak, "state": state}


def test_a_rank_needs_memory_for_its_rows_and_one_file(files, tmp_path):
    """While saving and loading, a rank holds its own rows and at most one file, and never all of anything."""
    for found in run_ranks(count_memory, 3, files, tmp_path):
        assert 0 < found["saving"] <= MAX_FILE_BYTES
        assert found["state"] < found["loading"] <= found["state"] + MAX_FILE_BYTES + HEADERS_BYTES
