"""What result lines say about the machine, and peak memory."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from benchmarking.fresh_process import in_fresh_process
from benchmarking.machine import describe, is_installed
from profiling.memory import peak_rss_bytes, reset_peak_rss
from transformerlm.utils.environment import installed_version


def test_environment_names_hardware_and_versions() -> None:
    """Every result carries processor, cores, threads, memory, GPU, and the versions that matter, as plain JSON."""
    found = describe(threads=3, packages=["regex"])
    assert json.loads(json.dumps(found)) == found
    assert found["hardware.threads"] == 3
    assert found["hardware.cpu"]
    assert found["hardware.cores"] >= 1
    assert found["hardware.ram_gb"] >= 0
    assert found["hardware.gpu"] is None
    assert found["versions.python"] == platform.python_version()
    assert found["versions.torch"]
    assert found["versions.regex"]


def test_a_missing_package_has_no_version() -> None:
    """A missing package is noticed without an import, and without an error."""
    assert installed_version("no-such-distribution") is None
    assert not is_installed("no_such_module")
    assert is_installed("json")


def hold(num_bytes: int) -> int:
    """Allocate and touch that much memory."""
    return len(b"x" * num_bytes)


def test_peak_memory_is_that_of_the_function_alone() -> None:
    """A fresh process's peak grows with what the function holds, and does not include its parent's."""
    if peak_rss_bytes() is None:
        pytest.skip("this system does not say how much memory a process held")
    ballast = b"x" * 200_000_000
    _, small = in_fresh_process(hold, 1)
    returned, large = in_fresh_process(hold, 100_000_000)
    assert returned == 100_000_000
    assert small is not None
    assert large is not None
    assert large - small == pytest.approx(100_000_000, rel=0.2)
    assert small < len(ballast)


def fail() -> None:
    """Raise as a benchmark may."""
    raise ValueError("text: expected some text")


def test_errors_in_a_fresh_process_come_back() -> None:
    """An error there is the same error here."""
    with pytest.raises(ValueError, match="expected some text"):
        in_fresh_process(fail)


def drop_and_hold(dropped: int, held: int) -> int | None:
    """Hold some bytes, drop them, reset, and hold others; return the peak above what was held in between."""
    hold(dropped)
    reset_peak_rss()
    before = peak_rss_bytes()
    hold(held)
    after = peak_rss_bytes()
    return None if before is None or after is None else after - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be counted anew on Linux only")
def test_the_peak_can_be_counted_anew() -> None:
    """After a reset, what was held and dropped before no longer counts."""
    extra, _ = in_fresh_process(drop_and_hold, 200_000_000, 50_000_000)
    assert extra == pytest.approx(50_000_000, rel=0.2)
