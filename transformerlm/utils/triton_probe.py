"""The smallest kernel: it shows whether Triton can build and launch one here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def probe() -> None:
    """Build a kernel and launch it on the current CUDA device; raise whatever goes wrong."""
    _set_one[(1,)](torch.zeros(1, device="cuda"))


@triton.jit
def _set_one(place):
    tl.store(place, 1.0)
