"""Faults on order: a run that is killed somewhere, and batches whose loss goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest

from transformerlm.training import loop
from transformerlm.training.trainer import Trainer


class Killed(BaseException):
    """Stands for a process that ends without warning."""


def kill() -> None:
    """End the run on the spot."""
    raise Killed


def stop_before(patch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Call `act` when the trainer is about to make `step`."""
    original = Trainer._step

    def watched(self: Trainer) -> Any:
        if self.state.step + 1 == step:
            act()
        return original(self)

    patch.setattr(Trainer, "_step", watched)


def kill_at(
    patch: pytest.MonkeyPatch, *, step: int, place: Literal["step", "micro-batch", "evaluation"] = "step"
) -> None:
    """Kill the run before `step`, in it after its first micro-batch, or in the validation that follows it."""
    if place == "step":
        stop_before(patch, step, kill)
        return
    losses, loss = [0], loop.cross_entropy

    def deadly(*args: Any, **settings: Any) -> Any:
        evaluating = "reduction" in settings
        losses[0] += not evaluating
        if losses[0] and (evaluating if place == "evaluation" else losses[0] == 2):
            raise Killed
        return loss(*args, **settings)

    stop_before(patch, step, lambda: patch.setattr(loop, "cross_entropy", deadly))


def poison(patch: pytest.MonkeyPatch, factors: Mapping[int, float]) -> None:
    """Multiply the training loss of some batches, each by its factor."""
    batch, cut, loss = [0], Trainer._micro_batches, loop.cross_entropy

    def watched(self: Trainer, step: int) -> Any:
        batch[0] = step + self.state.guard.data_offset
        return cut(self, step)

    def poisoned(*args: Any, **settings: Any) -> Any:
        training = "reduction" not in settings
        return loss(*args, **settings) * (factors.get(batch[0], 1.0) if training else 1.0)

    patch.setattr(Trainer, "_micro_batches", watched)
    patch.setattr(loop, "cross_entropy", poisoned)
