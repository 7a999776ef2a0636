"""Rows of a tensor in blocks that fit the processor's cache.

Elementwise formulas of several steps are bound by memory: each step reads and writes all of a tensor. When they take a
block at a time, only the first read and the last write leave the cache; on a CPU this is several times faster. Other
devices start a kernel for each step of a block and have no such cache, so their blocks are large.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_ELEMENTS = 2**17
"""Elements of a block, for each thread: half a megabyte of fp32."""

_DEVICE_ELEMENTS = 2**27

_CPU_LOGITS, _DEVICE_LOGITS = 2**24, 2**28


def logits_at_once(device_type: str) -> int:
    """Return how many logits are held at a time; in training, fewer mean more passes over the head's gradient."""
    return _CPU_LOGITS if device_type == "cpu" else _DEVICE_LOGITS


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of `x` `(rows, columns)`, in order."""
    elements = CPU_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else _DEVICE_ELEMENTS
    num_rows = max(1, elements // x.shape[-1])
    return (slice(start, start + num_rows) for start in range(0, len(x), num_rows))
