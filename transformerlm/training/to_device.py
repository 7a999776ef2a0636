"""Ids on their way from a token file to a device: as few bytes as they have in the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(ids: npt.NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """Return ids as int64 on a device, of the same shape."""
    if device.type == "cuda":
        return _sent(ids, device)
    return torch.from_numpy(ids.astype(np.int64, copy=False)).to(device)


def _sent(ids: npt.NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """Return `ids` as int64 on a device to which they travel with as few bytes as they have."""
    signed, bits = as_signed(ids)
    if torch.cuda.is_available():
        signed = signed.pin_memory()  # lets the copy run while the device computes
    return widened(signed.to(device, non_blocking=True), bits)


def as_signed(ids: npt.NDArray[np.integer[Any]]) -> tuple[Tensor, int | None]:
    """Return the bytes of `ids` as signed numbers of their size, and how many bits unsigned ones have; else None.

    PyTorch does not compute with all unsigned numbers on every device. The bytes are copied only where their order is
    another machine's.
    """
    native = np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("="))
    size = native.dtype.itemsize
    bits = 8 * size if native.dtype.kind == "u" and size < 8 else None
    return torch.from_numpy(native.view(f"i{size}")), bits


def widened(signed: Tensor, bits: int | None) -> Tensor:
    """Return the ids that `as_signed` gave, as int64, on the device where they are now."""
    wide = signed.to(torch.int64)
    return wide if bits is None else wide.bitwise_and_((1 << bits) - 1)
