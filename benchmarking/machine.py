"""What a result was measured on: processor, memory, GPU, versions. Imports torch only for facts about a device."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from transformerlm.utils.environment import cpu_model, cpuinfo, installed_version

_CPU_FEATURES = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2")


def describe(*, threads: int, device: str = "cpu", packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the entries that every result line carries: date, hardware and versions.

    Args:
        threads: CPU threads or processes that the benchmark computes with.
        device: the torch device; a GPU is named only if it is the one measured.
        packages: distributions whose versions matter besides Python, torch, numpy and ours.
    """
    names = dict.fromkeys(["transformerlm", "torch", "numpy", *packages])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware.cpu": cpu_model(),
        "hardware.cpu_features": cpu_features(),
        "hardware.cores": os.cpu_count(),
        "hardware.threads": threads,
        "hardware.ram_gb": round(_ram_bytes() / 1e9, 1),
        "hardware.gpu": _gpu_name(device),
        "hardware.load_average": _load_average(),
        "versions.python": platform.python_version(),
        **{f"versions.{name}": installed_version(name) for name in names},
    }


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return find_spec(module) is not None


def cpu_features() -> list[str]:
    """Return the processor's instruction sets that matter for matrix products (Linux only)."""
    flags = next((line.partition(":")[2].split() for line in cpuinfo() if line.startswith("flags")), [])
    return [name for name in _CPU_FEATURES if name in flags]


def _ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _gpu_name(device: str) -> str | None:
    if not device.startswith("cuda"):
        return "mps" if device == "mps" else None
    import torch

    return torch.cuda.get_device_name(device)
