"""Writing a checkpoint: a directory that is whole or does not exist, holds no pickle, and needs no other file.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  config.toml  tokenizer/
    checkpoints/latest, best    links to one of them, for people; the code looks at the step in the name

A checkpoint is written beside its place under a name that contains `.tmp`. Its files are flushed to disk, then the
directory is renamed, then its parent is flushed, then every file is read back. Only after that is the checkpoint
announced, and only after that are older ones removed. `state.json` holds the sha256 of every other file and of its own
values; a directory that fails the check is set aside as `.bad`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from transformerlm.checkpoints.directory import list_checkpoints, point, set_aside, step_name
from transformerlm.checkpoints.layout import MODEL, OPTIMIZER, index_name, index_text
from transformerlm.checkpoints.load import weights_of
from transformerlm.checkpoints.optimizer_state import OptimizerState
from transformerlm.checkpoints.side_by_side import TensorFile, num_bytes, plan_tensors, write_tensors
from transformerlm.checkpoints.validation import (
    FORMAT,
    FORMAT_OF_SEVERAL_FILES,
    CheckpointError,
    CheckpointNotSharedError,
    file_names,
    verify,
)
from transformerlm.distributed.rows import Rows
from transformerlm.distributed.world import World, gather_text, is_main, together
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils import files
from transformerlm.utils.files import file_sha256
from transformerlm.utils.json_files import values_sha256

MAX_FILE_BYTES = 4096 * 10**6
"""How large a file of tensors becomes, unless a caller says otherwise."""


@dataclass(frozen=True)
class Snapshot:
    """What a training run puts into a checkpoint besides the step.

    Args:
        weights: this rank's rows of each parameter, under the parameter's name.
        optimizer: its state, of which this rank has the same rows.
        tokenizer: None: the model was imported without one.
        config_toml: the run's configuration.
        state: what `state.json` holds besides; rank 0's counts.
    """

    weights: Mapping[str, Rows]
    optimizer: OptimizerState
    tokenizer: Tokenizer | None
    config_toml: str
    state: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        tokenizer: Tokenizer | None,
        *,
        config_toml: str,
        state: dict[str, Any],
    ) -> Snapshot:
        """Return the snapshot of a model and an optimizer that are all here."""
        return cls(weights_of(model), OptimizerState.of(optimizer), tokenizer, config_toml, state)


def save_checkpoint(
    root: Path,
    step: int,
    snapshot: Snapshot,
    *,
    world: World = World(),  # noqa: B008 (frozen)
    shard_size: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write the checkpoint of `step` below `root` and return its directory, durable and read back.

    Every rank calls this with its own rows; the first `shard_size` ranks have all rows together. An error of one rank
    is an error on all.

    Raises:
        OSError: the disk is full, not writable, or does not return what was written; nothing that looks whole is left.
    """
    final = root / step_name(step)
    try:
        _write(final, step, snapshot, world=world, shard_size=shard_size, max_file_bytes=max_file_bytes)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        older = "older checkpoints are whole; " if list_checkpoints(root) else ""
        raise OSError(
            f"{final}: cannot be written: {reason}; {older}free some space and start the same command again"
        ) from None
    try:
        _read_back(final, world)
        with together(world):
            if is_main(world):
                point(root / "latest", final)
    except ValueError as error:  # an OSError of another rank
        raise OSError(str(error)) from None
    return final


def _write(final: Path, step: int, snapshot: Snapshot, *, world: World, shard_size: int, max_file_bytes: int) -> None:
    """Let all ranks fill a directory beside `final`, which takes that name when all of it is on the disk."""
    with ExitStack() as stack:
        with together(world):
            directory = stack.enter_context(_unfinished(final, world))
        with together(world):
            files.wait_for(directory)
        plan = plan_tensors(snapshot.weights, snapshot.optimizer.tensors, max_bytes=max_file_bytes)
        sums = write_tensors(directory, plan, world=world, shard_size=shard_size)
        with together(world):
            if is_main(world):
                _write_facts(directory, step, snapshot, plan, sums)
        with together(world):
            stack.close()
            for parent in final.parents[1:3] if is_main(world) else ():  # the run's directory may be new, too
                files.sync(parent)


@contextmanager
def _unfinished(final: Path, world: World) -> Iterator[Path]:
    """Give all ranks the directory that rank 0 makes, renames to `final` at the end, and removes after an error."""
    if is_main(world):
        with files.whole_directory(final, displace=set_aside) as directory:
            yield directory
    else:
        yield final.with_name(f"{final.name}.tmp")


def count_tensor_files(snapshot: Snapshot, *, max_file_bytes: int = MAX_FILE_BYTES) -> int:
    """Return how many files of tensors a checkpoint would have; the tensors may be on the meta device."""
    return len(plan_tensors(snapshot.weights, snapshot.optimizer.tensors, max_bytes=max_file_bytes))


def _write_facts(
    directory: Path, step: int, snapshot: Snapshot, plan: Sequence[TensorFile], sums: Mapping[str, str]
) -> None:
    """Write everything but tensors; `state.json` comes last, with the sha256 of every other file."""
    for kind in (MODEL, OPTIMIZER):
        parts = [file for file in plan if file.kind == kind]
        if len(parts) > 1:
            total = sum(num_bytes(rows) for file in parts for rows in file.tensors.values())
            text = index_text({file.name: list(file.tensors) for file in parts}, total_bytes=total)
            (directory / index_name(kind)).write_text(text, encoding="utf-8")
    (directory / "config.toml").write_text(snapshot.config_toml, encoding="utf-8")
    if snapshot.tokenizer is not None:
        snapshot.tokenizer.save(directory / "tokenizer")
    for name in sums:
        files.wait_for(directory / name)
    state = {
        "format": FORMAT if len(plan) == len((MODEL, OPTIMIZER)) else FORMAT_OF_SEVERAL_FILES,
        "step": step,
        **snapshot.state,
        "optimizer": snapshot.optimizer.values,
        "sha256": {name: sums.get(name) or file_sha256(directory / name) for name in file_names(directory)},
    }
    state["state_sha256"] = values_sha256(state, kept_in="state_sha256")
    (directory / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")


def _read_back(directory: Path, world: World) -> None:
    """Compare what is on the disk with the sha256 of what was written; set the checkpoint aside if they differ."""
    with together(world):
        files.wait_for(directory / "state.json")
        for name in file_names(directory):
            files.forget_cached(directory / name)
    try:
        verify(directory, world=world)
    except CheckpointNotSharedError as error:  # it may well be whole
        raise OSError(str(error)) from None
    except CheckpointError as error:
        with together(world):
            aside = set_aside(directory).name if is_main(world) else ""
        raise OSError(
            f"{error}; the disk does not give back what was written: set aside as {gather_text(aside, world)[0]}, "
            "older checkpoints are whole"
        ) from None
