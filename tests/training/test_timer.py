"""The clock of a run: speed over a window, all the time that was used, and the time that counts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from transformerlm.training import timer
from transformerlm.training.timer import Timer, timed

CPU = torch.device("cpu")


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets time pass."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def wait(seconds: float) -> None:
        clock.now += seconds

    return wait


def test_a_call_is_timed(wait: Callable[[float], None]) -> None:
    """The seconds are those of the call alone."""
    wait(5.0)
    assert timed(lambda: wait(2.0), CPU) == 2.0


def test_speed_is_that_of_the_window_without_pauses(wait: Callable[[float], None]) -> None:
    """The first window has no rate; a pause counts in both counts of seconds and in no rate."""
    clock = Timer(CPU, before=100.0, elapsed_s=30.0)
    assert clock.rates(0) == {}
    wait(4.0)
    with clock.paused():
        wait(60.0)
    assert clock.rates(200) == {"tokens_per_second": 50.0}
    assert (clock.seconds(), clock.elapsed_s()) == (164.0, 94.0)


def test_a_restart_goes_back_in_the_time_that_counts_only(wait: Callable[[float], None]) -> None:
    """After a step back, the time used goes on, the time behind the step goes back, and the next window is a first."""
    clock = Timer(CPU)
    clock.rates(0)
    wait(10.0)
    clock.restart(elapsed_s=3.0)
    wait(1.0)
    assert (clock.seconds(), clock.elapsed_s()) == (11.0, 4.0)
    assert clock.rates(100) == {}
