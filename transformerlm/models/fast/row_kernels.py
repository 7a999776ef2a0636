"""The norm and the gate on CUDA, forward and backward as one kernel each.

A program reads its numbers once, computes in fp32, and writes once. The weight of a norm gets a sum over all rows: each
program adds up its own, and PyTorch adds up those of the programs, always in one order.

Part of: rms_norm, gated_silu
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 2**14
"""The longest rows that a norm's program can hold."""

_TILE = 4096  # numbers of a program at a time
_MAX_PROGRAMS = 512  # of a norm's backward pass: four for each multiprocessor of a large card


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of the rows of `x` `(rows, d)`, and 1 / rms of each `(rows, 1)` in fp32."""
    x, weight = x.contiguous(), weight.contiguous()
    output, scale = torch.empty_like(x), torch.empty(len(x), 1, device=x.device)
    rows, columns = _tile(x)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(len(x), rows),)
        _norm_forward_kernel[grid](x, weight, output, scale, len(x), x.shape[1], eps, ROWS=rows, COLUMNS=columns)
    return output, scale


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of `weight`, the latter in fp32; `scale` is that of the forward pass."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    rows, columns = _tile(x)
    num_tiles = triton.cdiv(len(x), rows)
    num_programs = min(num_tiles, _MAX_PROGRAMS)
    grad_x, parts = torch.empty_like(x), torch.empty(num_programs, x.shape[1], device=x.device)
    with torch.cuda.device_of(x):
        _norm_backward_kernel[(num_programs,)](
            grad, x, weight, scale, grad_x, parts, len(x), x.shape[1], num_tiles, ROWS=rows, COLUMNS=columns
        )
    return grad_x, parts.sum(dim=0)


def gate_forward(gate: Tensor, x: Tensor) -> Tensor:
    """Return `silu(gate) * x` of two tensors of one shape."""
    gate, x = gate.contiguous(), x.contiguous()
    output = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _gate_forward_kernel[(triton.cdiv(x.numel(), _TILE),)](gate, x, output, x.numel(), TILE=_TILE)
    return output


def gate_backward(grad: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and of `x`."""
    grad, gate, x = grad.contiguous(), gate.contiguous(), x.contiguous()
    grad_gate, grad_x = torch.empty_like(gate), torch.empty_like(x)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(x.numel(), _TILE),)
        _gate_backward_kernel[grid](grad, gate, x, grad_gate, grad_x, x.numel(), TILE=_TILE)
    return grad_gate, grad_x


def _tile(x: Tensor) -> tuple[int, int]:
    """Return how many rows a program takes at a time, and the next power of two of a row's length."""
    columns = triton.next_power_of_2(x.shape[1])
    return max(1, _TILE // columns), columns


@triton.jit
def _norm_forward_kernel(
    x, weight, output, scale, num_rows, num_columns, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS)
    columns = tl.arange(0, COLUMNS)
    places = rows[:, None] * num_columns + columns[None, :]  # (ROWS, COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    wide = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / num_columns + eps)  # (ROWS)
    normed = wide * inverse[:, None] * factors[None, :]
    tl.store(output + places, normed.to(output.dtype.element_ty), mask=inside)
    tl.store(scale + rows, inverse, mask=rows < num_rows)


@triton.jit
def _norm_backward_kernel(
    grad, x, weight, scale, grad_x, parts, num_rows, num_columns, num_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = tl.arange(0, COLUMNS)
    factors = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)  # w
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        places = rows[:, None] * num_columns + columns[None, :]  # (ROWS, COLUMNS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        inverse = tl.load(scale + rows, mask=rows < num_rows, other=0.0)[:, None]  # 1 / rms
        normed = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * inverse  # n
        wide = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)  # g
        total += tl.sum(wide * normed, axis=0)
        weighted = wide * factors[None, :]
        mean = (tl.sum(weighted * normed, axis=1) / num_columns)[:, None]  # mean(g w n)
        result = (weighted - normed * mean) * inverse
        tl.store(grad_x + places, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(0) * num_columns + columns, total, mask=columns < num_columns)


@triton.jit
def _gate_forward_kernel(gate, x, output, size, TILE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = places < size
    wide = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    product = wide * tl.sigmoid(wide) * tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + places, product.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(grad, gate, x, grad_gate, grad_x, size, TILE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = places < size
    upper = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)  # s
    silu = wide * sigmoid  # z s
    slope = sigmoid + silu * (1.0 - sigmoid)
    tl.store(grad_x + places, (upper * silu).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_gate + places, (upper * slope * factor).to(grad_gate.dtype.element_ty), mask=inside)
