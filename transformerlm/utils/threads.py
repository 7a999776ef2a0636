"""How torch's threads wait for each other, which must be said before torch is imported."""

from __future__ import annotations

import os
import sys
import warnings


def wait_politely() -> None:
    """Let torch's threads spin only for a moment while they wait for each other, unless the environment says how.

    By default they spin for so long that two runs side by side hardly move; threads that sleep at once cost a run that
    is alone a quarter of its speed (docs/LOG.md). OpenMP reads this when torch is imported, so call it before that; a
    later call warns. The commands do so by themselves. `GOMP_SPINCOUNT`, for GNU's OpenMP, goes before the policy,
    which is for the others.
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
