"""The tensors of a checkpoint, written by all ranks side by side: the files follow from shapes, each has one owner.

The bytes are the same from any number of ranks: a file holds whole tensors, gathered to its owner piece by piece.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from transformerlm.checkpoints.layout import MODEL, OPTIMIZER, plan_files
from transformerlm.checkpoints.tensor_files import TensorFileWriter, file_order
from transformerlm.distributed.owners import Delivery, deliver, find_senders
from transformerlm.distributed.rows import Rows
from transformerlm.distributed.world import World, gather_text, together
from transformerlm.utils.files import file_sha256
from transformerlm.utils.json_files import values_sha256


@dataclass(frozen=True)
class TensorFile:
    """A file of the checkpoint, and the names of its tensors, each after its kind."""

    name: str
    kind: str
    tensors: Mapping[str, Rows]


def plan_tensors(weights: Mapping[str, Rows], optimizer: Mapping[str, Rows], *, max_bytes: int) -> list[TensorFile]:
    """Return all files of tensors, which follow from names and shapes alone."""
    plan = []
    for kind, tensors in ((MODEL, weights), (OPTIMIZER, _in_order(optimizer))):
        sizes = {name: num_bytes(rows) for name, rows in tensors.items()}
        for file, names in plan_files(kind, sizes, max_bytes=max_bytes).items():
            plan.append(TensorFile(file, kind, {name: tensors[name] for name in names}))
    return plan


def _in_order(tensors: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return an optimizer's tensors in the order of its parameters, however its state came about."""
    parts = {
        name: [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]
        for name in tensors
    }
    return {name: tensors[name] for name in sorted(tensors, key=parts.__getitem__)}


def num_bytes(rows: Rows) -> int:
    """Return the bytes of the whole tensor, wherever its rows are."""
    return rows.local.element_size() * math.prod(rows.shape)


def write_tensors(directory: Path, plan: Sequence[TensorFile], *, world: World, shard_size: int) -> dict[str, str]:
    """Write all files of tensors, as many side by side as there are ranks; return the sha256 of each, on all ranks."""
    tensors = {f"{file.kind}.{name}": rows for file in plan for name, rows in file.tensors.items()}
    facts = [[name, str(rows.local.dtype), *rows.shape] for name, rows in tensors.items()]
    if len(set(gather_text(values_sha256({"tensors": facts}, kept_in=""), world))) > 1:
        raise ValueError("expected the same names, dtypes and shapes of tensors on all ranks, found others")
    senders = find_senders(tensors, world, shard_size=shard_size)
    sums: dict[str, str] = {}
    for first in range(0, len(plan), world.world_size):
        with together(world):
            sums |= _write_side_by_side(directory, plan[first : first + world.world_size], tensors, senders, world)
    return {name: found for text in gather_text(json.dumps(sums), world) for name, found in json.loads(text).items()}


def _write_side_by_side(
    directory: Path,
    part: Sequence[TensorFile],
    tensors: Mapping[str, Rows],
    senders: Mapping[str, Sequence[range]],
    world: World,
) -> dict[str, str]:
    """Write one file on each rank, from the rows of all; return the sha256 of ours."""
    orders = [file_order({name: rows.local.dtype for name, rows in file.tensors.items()}) for file in part]
    deliveries = [
        Delivery(owner, [f"{file.kind}.{name}" for name in order])
        for owner, (file, order) in enumerate(zip(part, orders, strict=True))
    ]
    if world.rank >= len(part):
        deliver(deliveries, tensors, senders=senders, world=world, receive=_receive_nothing)
        return {}
    own = part[world.rank]
    shapes = {name: (rows.local.dtype, rows.shape) for name, rows in own.tensors.items()}
    writer = TensorFileWriter(directory / own.name, shapes)
    deliver(deliveries, tensors, senders=senders, world=world, receive=writer.write)
    writer.finish()
    return {own.name: file_sha256(directory / own.name)}


def _receive_nothing(data: Tensor) -> None:
    raise AssertionError(data.shape)
