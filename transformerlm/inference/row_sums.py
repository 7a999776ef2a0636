"""Sums of rows that are the same to the last bit, whatever rows are beside them."""

from __future__ import annotations

import torch
from torch import Tensor

# torch sums a single row of 32,768 numbers or more in several threads, and then adds in another order.
_PIECE = 16_384


def sums_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums of weights, and of the uniform numbers that are compared with them.

    In fp64 a number in [0, 1), of 53 bits, stays below the whole sum when it is multiplied by that.
    """
    return torch.float64 if device.type != "mps" else torch.float32


def row_sums(rows: Tensor) -> Tensor:
    """Return the sums of rows `(..., n)` as `(...)`, in fp64 where the device has it."""
    dtype = sums_dtype(rows.device)
    if rows.shape[-1] <= _PIECE:
        return rows.sum(dim=-1).to(dtype)
    pieces = torch.split(rows, _PIECE, dim=-1)
    return torch.stack([piece.sum(dim=-1).to(dtype) for piece in pieces]).sum(dim=0)
