"""The gate of SwiGLU with a backward pass of its own, a block of rows at a time.

Autograd would keep the sigmoid and both products. Here the two inputs alone are kept, the sigmoid is recomputed, and
each block of rows stays in the processor's cache. On CUDA each pass is one kernel. Where nothing is differentiated, the
products are made in place.

Twin of `gated_silu`: `transformerlm.models.functional.gated_silu`
Test: tests/models/fast/test_gated_silu.py
Pays: 63.5 ms to 34.5 for 4,096 rows of 1,344 forward and backward, fp32, one thread (docs/LOG.md, 2026-11-26);
  on CUDA the kernels move 16 bytes a bf16 number, not 58, by arithmetic (docs/gpu.md): their speed is not measured yet
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.row_blocks import row_blocks
from transformerlm.utils.triton_kernels import can_launch


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """Return `silu(gate) * x`, where `silu(z) = z sigmoid(z)`, elementwise."""
    if not torch.is_grad_enabled():
        return torch.sigmoid(gate).mul_(gate).mul_(x)
    columns = gate.shape[-1]
    rows: Tensor = _GatedSiLU.apply(gate.reshape(-1, columns), x.reshape(-1, columns))  # type: ignore[no-untyped-call]
    return rows.view(x.shape)


class _GatedSiLU(torch.autograd.Function):
    """With s = sigmoid(z): the gradient of x is `g z s`, that of z is `g x (s + z s (1 - s))`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        if can_launch(x) and x.numel():
            from transformerlm.models.fast.row_kernels import gate_forward

            return gate_forward(gate, x)
        output = torch.empty_like(x)  # (rows, columns)
        for block in row_blocks(x):
            torch.mul(torch.sigmoid(gate[block]).mul_(gate[block]), x[block], out=output[block])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        if can_launch(x) and x.numel():
            from transformerlm.models.fast.row_kernels import gate_backward

            return gate_backward(grad, gate, x)
        grad_gate, grad_x = torch.empty_like(gate), torch.empty_like(x)
        for block in row_blocks(x):
            sigmoid = torch.sigmoid(gate[block])  # s, (block, columns)
            silu = sigmoid * gate[block]  # z s
            torch.mul(grad[block], silu, out=grad_x[block])
            slope = (sigmoid + silu).addcmul_(sigmoid, silu, value=-1)  # s + z s - s z s
            torch.mul(slope.mul_(grad[block]), x[block], out=grad_gate[block])
        return grad_gate, grad_x
