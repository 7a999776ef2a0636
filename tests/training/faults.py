"""Faults for tests: a run that is killed somewhere, and batches whose loss goes wrong."""

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
    original = Trainer.step

    def watched(self: Trainer) -> Any:
        if self.state.step + 1 == step:
            act()
        return original(self)

    patch.setattr(Trainer, "step", watched)


def kill_at(
    patch: pytest.MonkeyPatch, *, step: int, place: Literal["step", "micro-batch", "evaluation"] = "step"
) -> None:
    """Kill the run before `step`, after its first micro-batch, or in the validation that follows it."""
    if place == "step":
        stop_before(patch, step, kill)
        return
    name, fatal_call = ("cross_entropy", 1) if place == "evaluation" else ("training_loss", 2)
    calls, loss = [0], getattr(loop, name)

    def deadly(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == fatal_call:
            raise Killed
        return loss(*args, **settings)

    stop_before(patch, step, lambda: patch.setattr(loop, name, deadly))


def poison(patch: pytest.MonkeyPatch, factors: Mapping[int, float]) -> None:
    """Multiply the training loss of some batches, each by its factor."""
    batch, cut, loss = [0], Trainer.micro_batches, loop.training_loss

    def watched(self: Trainer, step: int) -> Any:
        batch[0] = step + self.state.guard.data_offset
        return cut(self, step)

    def poisoned(*args: Any, **settings: Any) -> Any:
        return tuple(number * factors.get(batch[0], 1.0) for number in loss(*args, **settings))

    patch.setattr(Trainer, "micro_batches", watched)
    patch.setattr(loop, "training_loss", poisoned)
