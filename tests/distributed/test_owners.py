"""Tensors whose rows are on several ranks come to their owners whole, in order, whatever the ranks and sizes are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import run_ranks
from transformerlm.distributed import owners
from transformerlm.distributed.owners import Delivery, deliver, find_senders
from transformerlm.distributed.rows import Rows, own_rows
from transformerlm.distributed.world import World

SHAPES = {"a": (7, 3), "b": (1, 5), "c": (), "d": (0, 4), "e": (64,), "f": (9, 2, 2), "whole": (5, 3)}
DTYPES = {"a": torch.float32, "c": torch.int64, "f": torch.bfloat16, "whole": torch.bool}


def whole(name: str) -> Tensor:
    """Return the tensor of a name, the same on all ranks."""
    values = torch.arange(torch.Size(SHAPES[name]).numel()).view(SHAPES[name]) + len(name)
    return values.to(DTYPES.get(name, torch.float64))


def own(name: str, place: int, shard_size: int) -> Rows:
    """Return the rows of a place; a tensor of no dimensions and the one named `whole` are on every place."""
    tensor = whole(name)
    if not tensor.ndim or name == "whole":
        return Rows.whole(tensor)
    rows = own_rows(tensor.shape[0], place, shard_size)
    return Rows(tensor[rows.start : rows.stop], SHAPES[name], rows.start)


def received(world: World, shard_size: int, batch_bytes: int) -> list[bytes]:
    """Deliver something to each rank, and return what came here and what should have."""
    owners.BATCH_BYTES = batch_bytes
    tensors = {name: own(name, world.rank % shard_size, shard_size) for name in SHAPES}
    names = list(SHAPES)
    deliveries = [Delivery(rank, names[rank:] + names[:rank]) for rank in reversed(range(world.world_size))]
    senders = find_senders(tensors, world, shard_size=shard_size)
    arrived: list[bytes] = []
    receive = lambda data: arrived.append(data.numpy().tobytes())  # noqa: E731
    deliver(deliveries, tensors, senders=senders, world=world, receive=receive)
    mine = next(delivery.names for delivery in deliveries if delivery.owner == world.rank)
    flat = [whole(name).reshape(-1) for name in mine]
    return [b"".join(arrived), b"".join(one.view(torch.uint8).numpy().tobytes() for one in flat if one.numel())]


def in_settings(world: World, shard_sizes: list[int]) -> list[list[bytes]]:
    """Do this for each size of a shard, with batches of one row, some, and all."""
    return [received(world, shard_size, size) for shard_size in shard_sizes for size in (1, 50, 2**20)]


@pytest.mark.parametrize(("world_size", "shard_sizes"), [(3, [3, 1]), (4, [4, 2])])
def test_each_owner_gets_whole_tensors_in_its_order(world_size, shard_sizes):
    """Every rank owns something, and gets its bytes, from shards of any size, in pieces of any size."""
    for found in run_ranks(in_settings, world_size, shard_sizes):
        for arrived, expected in found:
            assert arrived == expected


def test_one_process_needs_no_other(monkeypatch):
    """In a world of one, the owner gets its own bytes."""
    monkeypatch.setattr(owners, "BATCH_BYTES", owners.BATCH_BYTES)
    for arrived, expected in in_settings(World(), [1]):
        assert arrived == expected


def test_each_row_is_sent_once():
    """A tensor that is all here is sent by this rank alone; rows that leave a gap are a mistake of the caller."""
    assert find_senders({"w": Rows.whole(torch.zeros(4))}, World()) == {"w": [range(4)]}
    assert find_senders({"w": Rows.whole(torch.zeros(()))}, World()) == {"w": [range(1)]}
    with pytest.raises(AssertionError):
        find_senders({"w": Rows(torch.zeros(2), (4,), 0)}, World())
    with pytest.raises(AssertionError):
        find_senders({"w": Rows(torch.zeros(2), (4,), 2)}, World())
