"""Whether Triton's kernels can work on a tensor: CUDA devices, where a compiler for them works.

PyTorch's CUDA builds for Linux bring Triton. A kernel passes over memory once, where a formula in PyTorch's operators
passes over it once an operator. The kernels are in files of their own, which are imported only where this says yes.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_launch(x: Tensor) -> bool:
    """Return whether kernels may take `x`, which they compute in fp32; without them PyTorch's operators do the work.

    Tensors that only trace, and those of subclasses, have no memory that a kernel could read.
    """
    return (
        x.device.type == "cuda"
        and x.dtype in DTYPES
        and type(x) in (Tensor, nn.Parameter)
        and kernels_work()
        and computes(x)
    )


def computes(x: Tensor) -> bool:
    """Return whether the device of `x` computes its dtype: CUDA before 8.0 only keeps bf16, and Triton refuses it."""
    return x.dtype != torch.bfloat16 or x.device.type != "cuda" or _computes_bf16(x.device)


@functools.cache
def _computes_bf16(device: torch.device) -> bool:
    # Tensors that only trace may be on a device that is not there.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def kernels_work() -> bool:
    """Return whether a kernel can be built and launched; warn where Triton is there and cannot, and say why."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from transformerlm.utils.triton_probe import probe

        probe()
    except Exception as error:  # a C compiler or Python's headers are missing, the card is too old, ...
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"Triton cannot build kernels here ({problem}): training takes slower operators", stacklevel=2)
        return False
    return True
