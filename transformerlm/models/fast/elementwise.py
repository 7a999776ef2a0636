"""The norm and the gate of a block, each with a backward pass of its own, computed a block of rows at a time.

Autograd would keep every step's result and pass over memory for each. Here the inputs alone are kept, and the formulas
below give the gradients. Where the compiler is at work, or nothing will be differentiated, the plain formula stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.dtypes import upcast
from transformerlm.utils.row_blocks import row_blocks


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32, in the input's dtype."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        rows: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
        return rows.view(x.shape)
    wide = upcast(x)
    return (wide * _inverse_rms(wide, eps) * weight).to(x.dtype)


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """Return `silu(gate) * x`, where `silu(z) = z sigmoid(z)` (Shazeer 2020, eq. 6), elementwise."""
    if torch.compiler.is_compiling():
        return gate * torch.sigmoid(gate) * x
    if torch.is_grad_enabled():
        columns = gate.shape[-1]
        rows: Tensor = _GatedSiLU.apply(gate.reshape(-1, columns), x.reshape(-1, columns))  # type: ignore[no-untyped-call]
        return rows.view(x.shape)
    return torch.sigmoid(gate).mul_(gate).mul_(x)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x): the weight's gradient is `sum g n`, that of x is `(g w - n mean(g w n)) / rms(x)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output = torch.empty_like(x)
        scale = upcast(x[:, :1]).clone()  # 1 / rms(x)
        for block in row_blocks(x):
            wide = upcast(x[block])
            scale[block] = _inverse_rms(wide, eps)
            output[block] = (wide * scale[block]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=scale.dtype)
        wide_weight = weight.to(scale.dtype)
        for block in row_blocks(x):
            wide, normed = upcast(grad[block]), x[block] * scale[block]
            product = wide * normed
            grad_weight += product.sum(dim=0)
            mean = (product @ wide_weight).unsqueeze(-1) / weight.numel()
            grad_x[block] = (wide * wide_weight).addcmul_(normed, mean, value=-1).mul_(scale[block])
        return grad_x, grad_weight.to(weight.dtype), None


class _GatedSiLU(torch.autograd.Function):
    """With s = sigmoid(z): the gradient of x is `g z s`, that of z is `g x (s + z s (1 - s))`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        for block in row_blocks(x):
            torch.mul(torch.sigmoid(gate[block]).mul_(gate[block]), x[block], out=output[block])
        ctx.save_for_backward(gate, x)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        grad_gate, grad_x = torch.empty_like(gate), torch.empty_like(x)
        for block in row_blocks(x):
            sigmoid = torch.sigmoid(gate[block])
            silu = sigmoid * gate[block]
            torch.mul(grad[block], silu, out=grad_x[block])
            slope = (sigmoid + silu).addcmul_(sigmoid, silu, value=-1)
            torch.mul(slope.mul_(grad[block]), x[block], out=grad_gate[block])
        return grad_gate, grad_x


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
