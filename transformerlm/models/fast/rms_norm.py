"""RMSNorm with a backward pass of its own, a block of rows at a time.

Autograd would keep the result of every step of the formula and pass over memory for each. Here the input alone is kept,
with one number a row, and each block of rows stays in the processor's cache. On CUDA each pass is one kernel.

Twin of `rms_norm`: `transformerlm.models.functional.rms_norm`
Test: tests/models/fast/test_rms_norm.py
Pays: 28.6 ms to 9.3 for 4,096 rows of 512 forward and backward, one thread (docs/LOG.md, 2026-11-26);
  on CUDA the kernels move 20 bytes a number, not 100, by arithmetic (docs/gpu.md): their speed is not measured yet
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.dtypes import upcast
from transformerlm.utils.row_blocks import row_blocks
from transformerlm.utils.triton_kernels import can_launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32, in the input's dtype."""
    rows: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
    return rows.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x): the weight's gradient is `sum g n`, that of x is `(g w - n mean(g w n)) / rms(x)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if _takes_kernel(x):
            from transformerlm.models.fast.row_kernels import norm_forward

            output, scale = norm_forward(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return output
        output = torch.empty_like(x)  # (rows, d)
        scale = upcast(x[:, :1]).clone()  # 1 / rms(x), (rows, 1)
        for block in row_blocks(x):
            wide = upcast(x[block])
            scale[block] = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
            output[block] = (wide * scale[block]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if _takes_kernel(x):
            from transformerlm.models.fast.row_kernels import norm_backward

            grad_x, grad_weight = norm_backward(grad, x, weight, scale)
            return grad_x, grad_weight.to(weight.dtype), None
        # Every row adds to the weight's gradient, so its sum is kept wide.
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=scale.dtype)
        wide_weight = weight.to(scale.dtype)  # (d)
        for block in row_blocks(x):
            wide, normed = upcast(grad[block]), x[block] * scale[block]  # g and n, (block, d)
            product = wide * normed
            grad_weight += product.sum(dim=0)
            mean = (product @ wide_weight).unsqueeze(-1) / weight.numel()  # mean(g w n), (block, 1)
            grad_x[block] = (wide * wide_weight).addcmul_(normed, mean, value=-1).mul_(scale[block])
        return grad_x, grad_weight.to(weight.dtype), None


def _takes_kernel(x: Tensor) -> bool:
    if x.numel() == 0 or not can_launch(x):
        return False
    from transformerlm.models.fast.row_kernels import MAX_COLUMNS

    return x.shape[-1] <= MAX_COLUMNS
