"""Which device to compute on, how to wait for it, and how much memory it has."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

COMPILED_STEPS = 1000

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
_CGROUP_PARTS = ("/sys/fs/cgroup/memory.stat", "/sys/fs/cgroup/memory/memory.stat")


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda", "cuda:N", "mps", or "auto" for the best one available.

    "cuda:N" becomes the current one, so that nothing is begun on another GPU. Raises ValueError if the name is
    malformed or this machine has no such device.
    """
    if name == "auto":
        return _best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if device.type == "cuda":
        _check_cuda(name, device)
        if device.index is not None:
            torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: {name!r} is not available on this machine; use auto or cpu")
    return device


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_cuda(name: str, device: torch.device) -> None:
    if not torch.cuda.is_available():
        build = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ValueError(f"device: {name!r} is not available, {build}; use auto or cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device: {name!r} is not available, found {count} CUDA device(s), numbered from 0")


def to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers `(n,)` to the host; what is returned waits for them, and for nothing queued after them."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    host = numbers.to("cpu", non_blocking=True)  # to pinned memory
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(numbers.device))

    def wait() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return wait


def synchronize(device: torch.device | str) -> None:
    """Wait until everything queued on `device` is done, so that the next reading of a clock is true."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_memory_bytes(device: torch.device | str) -> int:
    """Return the memory of `device` in bytes: the card's total, or the RAM this process may use.

    For the CPU, and for MPS, which shares it, this is the smaller of the machine's RAM and the control group's limit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_ram_bytes(), *_cgroup_limits()])


def available_memory_bytes(device: torch.device | str) -> int:
    """Return how many bytes of `device_memory_bytes` are free now; all of them if the system does not say.

    Pages of files that the system keeps in RAM are free: it drops them when a program asks for memory.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_meminfo_available()]
    for limit, usage, parts in zip(_CGROUP_LIMITS, _CGROUP_USAGES, _CGROUP_PARTS, strict=True):
        if (most := _number_in(limit)) is not None and (used := _number_in(usage)) is not None:
            free.append(max(0, most - max(0, used - _file_pages_in(parts))))
    return min([device_memory_bytes(device), *(each for each in free if each is not None)])


def _meminfo_available() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return _windows_ram_bytes()


def _windows_ram_bytes() -> int:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((f"field_{i}", ctypes.c_ulonglong) for i in range(7)),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined, unused-ignore]
    return int(status.field_0)


def _cgroup_limits() -> list[int]:
    return [limit for limit in map(_number_in, _CGROUP_LIMITS) if limit is not None]


def _number_in(path: str) -> int | None:
    with suppress(OSError):
        text = Path(path).read_text().strip()
        return int(text) if text.isdecimal() else None  # "max" means no limit
    return None


def _file_pages_in(path: str) -> int:
    """Return the bytes of a control group's use that are pages of files, without shared memory, which must stay."""
    counts: dict[str, int] = {}
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, number = line.partition(" ")
            if number.isdecimal():
                counts[name.removeprefix("total_")] = int(number)  # version 1 counts the groups within it last
    return counts.get("active_file", 0) + counts.get("inactive_file", 0)


def should_compile(choice: bool | Literal["auto"], device: torch.device, num_steps: int) -> bool:
    """Return whether to compile a model for `num_steps` training steps; "auto" means: where it is likely to pay.

    On CUDA compiled steps are much faster, and a thousand of them make up for the minute that compiling takes; Triton
    may not work there, for want of a C compiler, or on an old card. On a CPU
    the kernels of `models` leave little to gain (docs/benchmarks.md), and a C++ compiler may be missing.
    """
    if choice != "auto":
        return choice
    if device.type != "cuda" or num_steps < COMPILED_STEPS:
        return False
    from transformerlm.utils.triton_kernels import kernels_work

    return kernels_work()
