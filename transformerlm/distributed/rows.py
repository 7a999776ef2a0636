"""A tensor of which each rank may hold some rows: what sharding, optimizers and checkpoints agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a tensor, cut along its first dimension; all of them where the tensor is not sharded.

    Args:
        local: the rows that are here, `(rows here, ...)`; changing it in place changes the tensor.
        shape: the shape of the whole tensor.
        first: the number of the first row that is here.
    """

    local: Tensor
    shape: tuple[int, ...]
    first: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> Rows:
        """Return a tensor that is all here."""
        return cls(tensor, tuple(tensor.shape))

    @property
    def is_whole(self) -> bool:
        """Whether all rows are here."""
        return tuple(self.local.shape) == self.shape


def own_rows(num_rows: int, place: int, num_places: int) -> range:
    """Return which of `num_rows` rows are at a place: equal shares, rounded up, so that the last places have fewer.

    This is the rule of `torch.chunk`, and so of FSDP2. A place may have none.
    """
    share = math.ceil(num_rows / num_places)
    return range(min(place * share, num_rows), min((place + 1) * share, num_rows))
