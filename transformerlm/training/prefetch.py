"""Batches that a thread makes while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from transformerlm.training.data import Batch


class Prefetcher:
    """Makes the batches of the next step in a thread, while the device computes those of this one.

    `make` is a pure function of the step, so batches made early are the same as batches made late. Those of a step that
    was not foreseen, as after a rollback, are made on request.
    """

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=_take_device, initargs=(_current_device(),))
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of `step`, and begin to make those of the step after it."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        return batches


def made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches of an iterator, each made in a thread while the device computes the one before it."""
    with ThreadPoolExecutor(1, "batches", initializer=_take_device, initargs=(_current_device(),)) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _current_device() -> int | None:
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # a run on the CPU begins no GPU
    return torch.cuda.current_device() if is_used else None


def _take_device(index: int | None) -> None:
    if index is not None:  # a new thread begins with the machine's first CUDA device
        torch.cuda.set_device(index)
