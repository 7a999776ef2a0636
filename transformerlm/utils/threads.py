"""How torch's threads wait for each other, which has to be set before torch is imported."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def wait_politely() -> None:
    """Let torch's threads spin only briefly while they wait for each other, unless the environment says how to wait.

    By default they spin for so long that two runs side by side hardly make progress. If they slept at once, a run that
    has the machine to itself would lose a quarter of its speed (docs/LOG.md). OpenMP reads this setting when torch is
    imported, so call this function before that; a later call warns. The commands call it themselves. GNU's OpenMP
    follows `GOMP_SPINCOUNT` rather than the policy, which is for the others.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "torch" in sys.modules:
        warnings.warn(
            "wait_politely: torch is imported already, and its threads stay as they are; call this first, or use "
            "torch.set_num_threads(1)",
            stacklevel=2,
        )


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Let torch share out its work among at most `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    if count >= before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
