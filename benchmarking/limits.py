"""The best that this machine can do: the speed of a large matrix product, and of copying memory.

Both are measured in the same rounds as the candidates, so that a busy neighbour slows all of them.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarking.harness import Clock, timed
from transformerlm.utils.device import synchronize

_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_TRIES = 3


class MatmulPeak:
    """FLOPs per second of a square matrix product in `dtype`: the best of three."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, clock: Clock = time.perf_counter) -> None:
        size = _MATMUL_SIZE.get(device.type, 2048)
        self._a, self._b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._timed = partial(timed, synchronize=partial(synchronize, device), clock=clock)

    def __call__(self) -> dict[str, float]:
        """Measure once."""
        multiply = partial(torch.mm, self._a, self._b, out=self._out)
        seconds = min(self._timed(multiply) for _ in range(_TRIES))
        return {"flops_per_second": 2 * len(self._a) ** 3 / seconds}


class CopyBandwidth:
    """Bytes per second that a large copy reads and writes: the best of three."""

    def __init__(self, device: torch.device, *, clock: Clock = time.perf_counter) -> None:
        self._source = torch.ones(_COPY_BYTES.get(device.type, 2**28), dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self._timed = partial(timed, synchronize=partial(synchronize, device), clock=clock)

    def __call__(self) -> dict[str, float]:
        """Measure once."""
        copy = partial(self._target.copy_, self._source)
        seconds = min(self._timed(copy) for _ in range(_TRIES))
        return {"bytes_per_second": 2 * len(self._source) / seconds}
