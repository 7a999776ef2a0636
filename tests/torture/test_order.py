"""What the real trainer announces is on disk: the order of a save, and a simulated power cut."""

from __future__ import annotations

import shutil

import pytest

from tests.torture.harness import Run
from tests.torture.order import audit_with_shim, audit_with_strace, cut_the_power

FEW = "--training.max_steps=25"


def test_the_order_of_a_save(real, tmp_path):
    """Write, flush files and directory, rename, flush the parent, announce, and only then remove older ones."""
    assert audit_with_shim(Run(real, tmp_path), FEW) == []


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_the_order_of_a_save_as_the_kernel_sees_it(real, tmp_path):
    """The same, by the system calls that strace shows."""
    assert audit_with_strace(Run(real, tmp_path), ["-m", "cli.train"], FEW) == []


def test_a_power_cut_loses_nothing_announced(real, tmp_path):
    """Taking away all that was not flushed at an announcement leaves the announced checkpoint."""
    assert cut_the_power(real, tmp_path) == []
