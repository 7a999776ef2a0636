"""Sums of rows that are the same to the last bit, whatever rows are beside them."""

from __future__ import annotations

import torch
from torch import Tensor

# torch sums a single row of 32,768 numbers or more in several threads, and then adds in another order.
_PIECE = 16_384


def row_sums(rows: Tensor) -> Tensor:
    """Return the sums of rows `(..., n)` as `(...)`, in fp64 where the device has it."""
    dtype = torch.float64 if rows.device.type != "mps" else torch.float32
    if rows.shape[-1] <= _PIECE:
        return rows.sum(dim=-1).to(dtype)
    pieces = torch.split(rows, _PIECE, dim=-1)
    return torch.stack([piece.sum(dim=-1).to(dtype) for piece in pieces]).sum(dim=0)
