"""CUDA memory: allocation history, snapshots and peaks; every function is safe without a CUDA device.

A snapshot opens in the viewer at https://pytorch.org/memory_viz, which runs in the browser and uploads nothing.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def start_history(enabled: bool = True, *, max_entries: int = 100_000) -> bool:
    """Begin to record every allocation with its stack trace; return whether anything is recorded.

    With `enabled` False nothing begins, so that a caller can pass a setting on. The newest `max_entries` events are
    kept. Recording slows every allocation, so use it for the steps of interest and not for a whole run.
    """
    if not enabled or not _has_cuda():
        return False
    import torch

    torch.cuda.memory._record_memory_history(max_entries=max_entries)
    return True


def dump_snapshot(path: str | os.PathLike[str]) -> bool:
    """Write the recorded history and the state of the allocator to `path`; return whether a file was written.

    Raises OSError if the file cannot be written.
    """
    if not _has_cuda():
        return False
    import torch

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write beside and rename: a job killed in the middle of a large snapshot must not leave a broken file.
    unfinished = target.with_name(target.name + ".tmp")
    torch.cuda.memory._dump_snapshot(str(unfinished))  # type: ignore[no-untyped-call]
    unfinished.replace(target)
    return True


def summary() -> str:
    """Return the allocator's table for the current CUDA device, or one sentence if there is no device."""
    if not _has_cuda():
        return "no CUDA device: no device memory to report"
    import torch

    return str(torch.cuda.memory_summary())


def peaks() -> dict[str, int]:
    """Return the highest memory use so far, in bytes.

    `cpu_peak_rss_bytes` is the resident memory of this process (absent on Windows), `cuda_peak_allocated_bytes` and
    `cuda_peak_reserved_bytes` are those of the current device. All count from `reset_peaks`, except that systems other
    than Linux count the first over the whole life of the process.
    """
    found: dict[str, int] = {}
    resident = peak_rss_bytes()
    if resident is not None:
        found["cpu_peak_rss_bytes"] = resident
    if _has_cuda():
        import torch

        found["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory so far where a model computes; None if the system does not say.

    On a CUDA device, that is what torch has allocated there, else the resident memory of this process.
    """
    if device.type == "cuda":
        import torch

        stats = torch.cuda.memory_stats_as_nested_dict(device)  # `max_memory_allocated` sorts all of them first
        return int(stats["allocated_bytes"]["all"]["peak"]) if stats else 0
    return peak_rss_bytes()


def reset_peaks(device: torch.device | None = None) -> None:
    """Reset the peaks of a CUDA `device` (None: the current one), and the process's if the system can (Linux)."""
    reset_peak_rss()
    if _has_cuda() and (device is None or device.type == "cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_rss_bytes() -> int | None:
    """Return the most memory this process has held so far, or None if the system does not say.

    `VmHWM` counts from the program's start; `ru_maxrss` also counts the parent it was forked from, so it comes second.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` count from what this process holds now, if the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _has_cuda() -> bool:
    # The helpers below raise different types on different CPU builds, so they are not even called there.
    import torch

    return torch.cuda.is_available()
