"""Tensors whose rows are on several ranks, sent whole to the ranks that own them: point to point, in small pieces.

The first ranks, which together hold one copy of everything, send; any rank may receive, such as one that writes a
file. An owner needs memory for its own rows and for one piece from each sender, however large a tensor is; a sender,
for one piece for each owner.

All ranks go through the same steps in the same order. In a step each owner gets one batch of pieces, and every rank
starts all that it has to send and to receive before it waits for any of it. So no two ranks ever wait for each other,
and all owners work side by side. The bytes travel over gloo, from memory of the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from transformerlm.distributed.rows import Rows
from transformerlm.distributed.world import World, all_reduce_sum

BATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Delivery:
    """The tensors that one rank receives, one after another."""

    owner: int
    names: Sequence[str]


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor, which one rank sends."""

    sender: int
    name: str
    rows: range
    num_bytes: int


def find_senders(tensors: Mapping[str, Rows], world: World, *, shard_size: int = 1) -> dict[str, list[range]]:
    """Return for each tensor the rows that each of the first `shard_size` ranks sends, so that each row is sent once.

    All ranks call this with the same names in the same order. A tensor that several ranks hold whole is sent by the
    first of them. A tensor of no dimensions counts as one row.
    """
    own = torch.tensor([(rows.first, _num_rows(rows.local)) for rows in tensors.values()], dtype=torch.int64)
    table = torch.zeros((shard_size, *own.shape), dtype=torch.int64)  # (senders, tensors, 2)
    if world.rank < shard_size:
        table[world.rank] = own
    table = all_reduce_sum(table, world)
    senders: dict[str, list[range]] = {}
    for index, (name, rows) in enumerate(tensors.items()):
        sent, shares = 0, []
        for first, count in table[:, index].tolist():
            stop = max(sent, first + count)
            assert first <= sent or count == 0, (name, sent, first)
            shares.append(range(sent, stop))
            sent = stop
        assert sent == (rows.shape[0] if rows.shape else 1), (name, rows.shape, shares)
        senders[name] = shares
    return senders


def deliver(
    deliveries: Sequence[Delivery],
    tensors: Mapping[str, Rows],
    *,
    senders: Mapping[str, Sequence[range]],
    world: World,
    receive: Callable[[Tensor], None],
) -> None:
    """Send each delivery's tensors, whole and in its order, to its owner; all ranks call this with the same deliveries.

    Args:
        deliveries: at most one to a rank.
        tensors: this rank's rows of all tensors.
        senders: what `find_senders` returned.
        world: the ranks.
        receive: called on an owner with bytes, `(num_bytes,)` of uint8, which in this order make up its tensors. It
            must not raise, since other ranks would wait for this one forever.
    """
    batches = [list(_batches(delivery, tensors, senders)) for delivery in deliveries]
    for step in range(max(map(len, batches), default=0)):
        due = [(delivery.owner, of[step]) for delivery, of in zip(deliveries, batches, strict=True) if step < len(of)]
        for data in _exchange(due, tensors, world.rank):
            receive(data)


def _exchange(due: Sequence[tuple[int, Sequence[_Piece]]], tensors: Mapping[str, Rows], rank: int) -> list[Tensor]:
    """Send and receive one batch of each owner, and return the pieces of our own."""
    waits, received, sent = [], [], []
    for owner, batch in due:
        for tag, piece in enumerate(batch):  # tags tell the pieces of one sender and one owner apart
            if piece.sender == owner == rank:
                received.append(_bytes_of(tensors[piece.name], piece.rows))
            elif owner == rank:
                received.append(torch.empty(piece.num_bytes, dtype=torch.uint8))
                waits.append(dist.irecv(received[-1], src=piece.sender, tag=tag))
            elif piece.sender == rank:
                sent.append(_bytes_of(tensors[piece.name], piece.rows))
                waits.append(dist.isend(sent[-1], dst=owner, tag=tag))
    for wait in waits:
        assert wait is not None
        wait.wait()
    return received


def _batches(
    delivery: Delivery, tensors: Mapping[str, Rows], senders: Mapping[str, Sequence[range]]
) -> Iterator[list[_Piece]]:
    """Yield a delivery's pieces in order, as many at a time as `BATCH_BYTES` hold."""
    batch: list[_Piece] = []
    room = BATCH_BYTES
    for name in delivery.names:
        for piece in _pieces(name, tensors[name], senders[name]):
            if batch and piece.num_bytes > room:
                yield batch
                batch, room = [], BATCH_BYTES
            batch.append(piece)
            room -= piece.num_bytes
    if batch:
        yield batch


def _pieces(name: str, tensor: Rows, shares: Sequence[range]) -> Iterator[_Piece]:
    row_bytes = tensor.local.element_size() * math.prod(tensor.shape[1:])
    if not row_bytes:
        return
    step = max(1, BATCH_BYTES // row_bytes)
    for sender, share in enumerate(shares):
        for first in share[::step]:
            rows = range(first, min(first + step, share.stop))
            yield _Piece(sender, name, rows, row_bytes * len(rows))


def _bytes_of(tensor: Rows, rows: range) -> Tensor:
    """Return the bytes of some rows in the host's memory, `(num_bytes,)`; a copy only if they are not there yet."""
    local = tensor.local.detach()
    if local.ndim:
        local = local[rows.start - tensor.first : rows.stop - tensor.first]
    return local.cpu().contiguous().reshape(-1).view(torch.uint8)


def _num_rows(local: Tensor) -> int:
    return local.shape[0] if local.ndim else 1
