"""Batches made ahead are those made on time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from transformerlm.training.data import Batch, get_batch, sequential_batches
from transformerlm.training.prefetch import Prefetcher, made_ahead

TOKENS = np.arange(1000, dtype=np.uint16)
BATCH = {"batch_size": 12, "context_length": 8, "seed": 3, "step": 7}


def test_batches_of_a_validation_are_made_ahead_in_order() -> None:
    """Each is made while the one before it is used; an error comes where its batch would be."""
    whole = list(sequential_batches(TOKENS, batch_size=4, context_length=7))
    made = threading.Event()

    def slow() -> Iterator[Batch]:
        yield whole[0]
        made.set()
        yield whole[1]
        raise OSError("the disk is gone")

    batches = made_ahead(slow())
    assert next(batches) is whole[0]
    assert made.wait(60), "the second is made before anybody asks for it"
    assert next(batches) is whole[1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    ahead = list(made_ahead(iter(whole)))
    assert len(ahead) == len(whole)
    assert all(one is other for one, other in zip(ahead, whole, strict=True))


def batch_of(step: int) -> list[Batch]:
    return [get_batch(TOKENS, **{**BATCH, "step": step})]


@pytest.mark.parametrize("steps", [[1, 2, 3], [5, 6, 3, 4], [2, 2, 9]])
def test_batches_made_ahead_are_those_made_on_time(steps: list[int]) -> None:
    """In order, after a jump back and after a jump ahead, each step gets its own batch."""
    prefetched = Prefetcher(batch_of)
    for step in steps:
        assert torch.equal(prefetched(step)[0][0], batch_of(step)[0][0])


def test_the_next_step_is_made_while_this_one_is_used() -> None:
    """The second step's batch is there, or in the making, before it is requested; nothing is made twice."""
    made: list[int] = []

    def make(step: int) -> list[Batch]:
        made.append(step)
        return batch_of(step)

    prefetched = Prefetcher(make)
    for step in (1, 2, 3):
        prefetched(step)
    prefetched._thread.shutdown()
    assert made == [1, 2, 3, 4]


def test_an_error_in_the_thread_is_that_of_its_step() -> None:
    """An error while working ahead is raised when its step comes, and not before."""

    def make(step: int) -> list[Batch]:
        if step == 2:
            raise OSError("the disk has gone")
        return batch_of(step)

    prefetched = Prefetcher(make)
    prefetched(1)
    with pytest.raises(OSError, match="the disk has gone"):
        prefetched(2)


@pytest.mark.gpu
def test_batches_made_ahead_are_right_on_the_gpu() -> None:
    """The thread's copies are complete when the step uses them."""
    prefetched = Prefetcher(lambda step: [get_batch(TOKENS, **{**BATCH, "step": step}, device="cuda")])
    for step in range(1, 50):
        assert torch.equal(prefetched(step)[0][0].cpu(), batch_of(step)[0][0])
