"""Muon over the rows of matrices that several ranks share: each matrix is made orthogonal by one of them, its owner.

A step of `muon.Muon` on whole matrices gives the same numbers. Momentum, decay and the last line are elementwise, so
each rank does them for its own rows. Only `orthogonal(U)` needs a whole matrix: the ranks send their rows of U to its
owner, and get those of the result back. Each rank owns an equal number of the matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transformerlm.distributed.rows import own_rows
from transformerlm.distributed.sharding import Shards, exchange
from transformerlm.training.muon import UPDATE_RMS, Muon, orthogonalize_all
from transformerlm.training.optim import Group

# For each rank. More make fewer exchanges, and need more memory for a moment.
MATRICES_AT_ONCE = 4


class ShardedMuon(Muon):
    """`Muon` whose parameters are the rows that `shards` has here; every rank of the group makes each step."""

    def __init__(self, params: Any, lr: float, *, shards: Shards, **settings: Any) -> None:
        super().__init__(params, lr, **settings)
        self._shards = shards

    def _update(self, params: list[Tensor], weights: list[Tensor], grads: list[Tensor], group: Group) -> None:
        if not group["orthogonal"]:
            super()._update(params, weights, grads, group)
            return
        buffers = self._moments(params, "momentum_buffer")
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        updates = list(torch._foreach_add(grads, buffers, alpha=group["momentum"]))  # U, rows of it
        shapes = [rows.shape for rows in self._shards.rows_of(params)]
        updates = self._orthogonal_rows(updates, shapes)
        rates = [-group["lr"] * UPDATE_RMS * math.sqrt(max(shape)) for shape in shapes]
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(updates, rates)
        torch._foreach_add_(weights, updates)

    def _buckets(self, params: list[Tensor], group: Group) -> list[list[Tensor]]:
        """Take a few matrices for each rank at a time, which bounds the memory of an exchange."""
        if not group["orthogonal"]:
            return super()._buckets(params, group)
        size = MATRICES_AT_ONCE * self._shards.shard_size
        return [params[start : start + size] for start in range(0, len(params), size)]

    def _orthogonal_rows(self, updates: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Return this rank's rows of each matrix after it was made orthogonal; matrix i belongs to place i mod n."""
        n, place, group = self._shards.shard_size, self._shards.place, self._shards.group
        assert group is not None
        owned, empty = range(place, len(updates), n), updates[0].new_empty(0)

        def num_numbers(matrix: int, at: int) -> int:
            rows, columns = shapes[matrix]
            return len(own_rows(rows, at, n)) * columns

        # All rows of the matrices that are owned here, place by place: (numbers of its rows of each,) from each place.
        parts = [torch.cat([empty, *(updates[i].reshape(-1) for i in range(at, len(updates), n))]) for at in range(n)]
        received = exchange(parts, [sum(num_numbers(i, at) for i in owned) for at in range(n)], group)
        pieces = [torch.split(part, [num_numbers(i, at) for i in owned]) for at, part in enumerate(received)]
        matrices = [torch.cat(rows).view(shapes[i]) for i, rows in zip(owned, zip(*pieces, strict=True), strict=True)]
        results = orthogonalize_all(matrices, self._precision)
        parts = [
            torch.cat([empty, *(result[_slice(len(result), at, n)].reshape(-1) for result in results)])
            for at in range(n)
        ]
        sizes = [sum(num_numbers(i, place) for i in range(at, len(updates), n)) for at in range(n)]
        answers = exchange(parts, sizes, group)
        rows = list(updates)
        for at, answer in enumerate(answers):
            theirs = range(at, len(updates), n)
            for i, flat in zip(theirs, torch.split(answer, [num_numbers(i, place) for i in theirs]), strict=True):
                rows[i] = flat.view_as(updates[i])
        return rows


def _slice(num_rows: int, place: int, num_places: int) -> slice:
    rows = own_rows(num_rows, place, num_places)
    return slice(rows.start, rows.stop)
