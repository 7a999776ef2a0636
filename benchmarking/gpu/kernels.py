"""Where a training step's time on the device goes, by kernel and by purpose, according to torch.profiler."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TRACE_STEPS = 3
# The calls around a kernel's launch decide first, then the kernel's own name.
_BY_CALLER = (
    ("loss", re.compile(r"_HeadLoss|CrossEntropy|cross_entropy|nll_loss")),
    ("optimizer", re.compile(r"Optimizer\.step|_foreach_|_fused_adamw|linalg_vector_norm")),
)
_BY_NAME = (
    ("loss", re.compile(r"_loss_kernel")),
    ("optimizer", re.compile(r"_adamw_kernel")),
    ("attention", re.compile(r"flash|fmha|attention|sdpa|softmax_(?:warp|forward|backward)", re.IGNORECASE)),
    (
        "products",
        re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|matmul|splitk|aten::(?:mm|bmm|addmm|baddbmm)$", re.IGNORECASE),
    ),
    ("copies", re.compile(r"memcpy|memset|aten::(?:copy_|_to_copy)", re.IGNORECASE)),
)
OTHERS = "norm, gate, rotation and the rest"
HEAD = "products of the head"
"""Our loss makes the logits and their gradients itself."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's launches in a step: its name, what it is for, how often it ran and for how many microseconds."""

    name: str
    purpose: str
    calls: float
    microseconds: float


def trace(step: Callable[[], object], device: str) -> list[Kernel]:
    """Return the kernels of a step, the slowest first; on a CPU, its operators instead."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(TRACE_STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    events = profiler.events()
    assert events is not None, "the profiler has ended"
    for name, callers, microseconds in _launches(events, on_device=device == "cuda"):
        entry = totals[name, purpose_of(name, callers)]
        entry[0] += 1
        entry[1] += microseconds
    kernels = [
        Kernel(name, purpose, calls / TRACE_STEPS, microseconds / TRACE_STEPS)
        for (name, purpose), (calls, microseconds) in totals.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def purpose_of(name: str, callers: list[str]) -> str:
    """Return what a kernel is for, judged by the calls that launched it, the nearest first, and by its name."""
    by_name = next((purpose for purpose, pattern in _BY_NAME if pattern.search(name)), OTHERS)
    for purpose, pattern in _BY_CALLER:
        if any(pattern.search(caller) for caller in callers):
            return HEAD if (purpose, by_name) == ("loss", "products") else purpose
    return by_name


def shares(kernels: list[Kernel]) -> dict[str, float]:
    """Return each purpose's microseconds a step."""
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        found[kernel.purpose] += kernel.microseconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _launches(events: Any, *, on_device: bool) -> Iterator[tuple[str, list[str], float]]:
    """Yield each kernel's name, the calls that launched it, and its microseconds."""
    linked: Counter[str] = Counter()
    for event in events:
        if on_device:
            for kernel in event.kernels:
                linked[kernel.name] += 1
                yield kernel.name, [event.name, *_callers(event)], float(kernel.duration)
        elif event.self_cpu_time_total > 0:
            yield event.name, [event.name, *_callers(event)], float(event.self_cpu_time_total)
    if on_device:
        yield from _launched_by_nobody(events, linked)


def _launched_by_nobody(events: Any, linked: Counter[str]) -> Iterator[tuple[str, list[str], float]]:
    """Yield the kernels that the profiler found on the device but in no call, as compiled code may launch them."""
    for event in events:
        is_kernel = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        if not is_kernel:
            continue
        if linked[event.name]:
            linked[event.name] -= 1
        else:
            yield event.name, [], float(event.time_range.elapsed_us())


def _callers(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name
