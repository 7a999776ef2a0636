"""The dtype policy of the whole program, in one place.

Weights and optimizer states are fp32. With precision "bf16" the matrix products run in bfloat16 under autocast; norms,
softmax and loss compute in fp32 through `upcast` and return the dtype of their input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]
PrecisionName = Literal["fp32", "bf16", "auto"]

PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16", "auto")


def parse_precision(name: str) -> PrecisionName:
    """Return `name` if it is one of "fp32", "bf16" and "auto"; raise ValueError otherwise."""
    if name not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {name!r}")
    return name


def resolve_precision(name: str, device: torch.device | str) -> Precision:
    """Return the precision to compute in on `device`; "auto" is bf16 if the hardware multiplies it faster than fp32.

    That is: CUDA devices of compute capability 8 and above, and processors with AMX tiles or AVX-512 BF16.
    """
    precision = parse_precision(name)
    if precision != "auto":
        return precision
    device = torch.device(device)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    # Both probes are private to torch and absent from some builds.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def autocast(device: torch.device | str, precision: Precision) -> AbstractContextManager[object]:
    """Return the context in which the forward pass runs: bfloat16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def set_tf32(allowed: bool, device: torch.device | str) -> None:
    """Allow or forbid CUDA to multiply fp32 matrices in TF32, for the whole process; other devices are not changed.

    This is torch's older switch: with the newer one, `fp32_precision`, torch.compile fails in some versions of torch
    (pytorch issue 166387).
    """
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def upcast(x: Tensor) -> Tensor:
    """Return `x` in at least fp32: half precisions are widened, fp32 and fp64 are returned unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cast_for_matmul(x: Tensor) -> Tensor:
    """Return `x` in autocast's dtype when autocast is on.

    Autocast would do the same at every product; several products that read one tensor share one cast this way.
    """
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(device_type))
