"""What it costs to get freed memory again, in page faults of a separate process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

has_mallopt = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
pytestmark = pytest.mark.skipif(not has_mallopt, reason="needs glibc")

FAULTS = """
import resource, sys
import torch
from transformerlm.utils.allocator import keep_freed_memory

kept, unmeasured = keep_freed_memory(torch.device(sys.argv[1])), int(sys.argv[2])
for repeat in range(unmeasured + 4):
    if repeat == unmeasured:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 18)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 64 * 256  # of the last four tensors


def _faults(device: str, unmeasured: int, **environment: str) -> tuple[bool, int]:
    names = ("MALLOC_", "GLIBC_TUNABLES")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = [sys.executable, "-c", FAULTS, device, str(unmeasured)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_memory_that_was_freed_is_there_again() -> None:
    """On a CPU, creating the same tensor repeatedly takes no new pages."""
    kept, faults = _faults("cpu", 40)  # until then glibc may leave a few holes beside each other
    assert kept
    assert faults < PAGES / 100


@pytest.mark.parametrize(
    ("device", "environment"),
    [("meta", {}), ("cpu", {"MALLOC_MMAP_MAX_": "65536"}), ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"})],
)
def test_elsewhere_and_with_settings_of_the_users_own_nothing_changes(device: str, environment: dict[str, str]) -> None:
    """Each time, pages are taken from the system and returned, as in any process (huge pages are few)."""
    kept, faults = _faults(device, 2, **environment)
    assert not kept
    assert faults > PAGES / 1000
