"""One decoding step captured as a CUDA graph: a single launch instead of hundreds of small ones.

It is not yet measured on a GPU; `python -m benchmarking.gpu_suite` compares it with eager steps (docs/gpu.md).

Part of: decoder
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""From ids `(batch, 1)` and their positions `(batch)` to logits `(batch, vocab_size)`, in fixed memory."""


class CapturedStep:
    """A step on one cache's memory, captured when this object is made.

    The positions are on the device and count themselves; they are copied there only after the cache was changed in
    another way, by a longer piece of text or a cut. The object must not hold the cache, which holds it: such a cycle
    would keep the device's memory until Python looks for cycles.
    """

    def __init__(self, step: Step, lengths: list[int], device: torch.device) -> None:
        self._lengths = list(lengths)
        self._positions = torch.tensor(lengths, device=device)  # (batch)
        self._ids = torch.zeros(len(lengths), 1, dtype=torch.int64, device=device)
        # Kernels must have run before they are captured, on a stream other than the default one. What these steps write
        # goes to the positions that the first real step writes again.
        side, captured = _streams(device)
        with torch.cuda.device(device):  # its streams are the current ones
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(self._ids, self._positions)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may load the next model meanwhile, whose allocations would end the capture.
            with torch.cuda.graph(self._graph, stream=captured, capture_error_mode="thread_local"):
                self._logits = step(self._ids, self._positions)  # (batch, vocab_size)
                self._positions.add_(1)

    def __call__(self, token_ids: Tensor, lengths: list[int]) -> Tensor:
        """Return the logits `(batch, vocab_size)` after one more id a row, `(batch, 1)`, at the positions `lengths`."""
        if self._lengths != lengths:
            self._positions.copy_(torch.tensor(lengths))
        self._ids.copy_(token_ids)
        self._graph.replay()
        self._lengths = [length + 1 for length in lengths]
        return self._logits.clone()  # The next step overwrites its own.


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return the streams of a device on which steps are tried, and those on which they are captured."""
    # The same for all graphs: the libraries keep some 30 MB for every stream that a product ever ran on. A graph works
    # in that memory, so what is tried, maybe in another thread, has a stream of its own.
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
