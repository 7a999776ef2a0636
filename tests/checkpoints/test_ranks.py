"""Checkpoints that several ranks write and read: the same bytes from any number of them, and one result on all."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tests.checkpoints.sharded import MAX_FILE_BYTES, Training, own_part, whole_training
from tests.distributed.ranks import run_ranks
from tests.training.tiny_run import TinyFiles
from transformerlm.checkpoints.load import load_optimizer, load_weights
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import verify
from transformerlm.distributed import owners
from transformerlm.distributed.world import World

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
