"""The training loss of rows of logits on CUDA, as one kernel that leaves their gradient in their place.

A program has one row. It reads the row twice, first for its maximum and its sum, then for the gradient. The second
reading finds it in the device's cache: a row of 50,000 bf16 logits has 100 kilobytes. So memory is read once and
written once, in all 4 bytes a bf16 logit, where PyTorch's operators move 44.

Part of: linear_cross_entropy
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _NUM_WARPS = 4096, 8


def replace_by_gradient(
    logits: Tensor, targets: Tensor, *, num_rows: int, soft_cap: float | None, z_loss: float
) -> Tensor:
    """Put the gradient of the mean over `num_rows` rows in place of the logits; return the sums of both terms.

    `logits` is `(rows, vocab)`, `targets` `(rows)`. A target that is no id makes the loss nan.
    """
    nats = torch.empty(2, len(logits), device=logits.device)  # of each row: cross-entropy, and log(Z)^2
    block = min(_BLOCK, triton.next_power_of_2(logits.shape[1]))
    with torch.cuda.device_of(logits):
        _loss_kernel[(len(logits),)](
            logits,
            targets,
            nats,
            logits.stride(0),
            targets.stride(0),
            logits.shape[1],
            1.0 / num_rows,
            2.0 * z_loss,
            1.0 if soft_cap is None else float(soft_cap),
            HAS_CAP=soft_cap is not None,
            BLOCK=block,
            num_warps=_NUM_WARPS,
        )
    return nats.sum(dim=1)


@triton.jit
def _bounded(x, cap):
    # tanh(y) = 2 sigmoid(2 y) - 1
    return 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0


@triton.jit
def _loss_kernel(
    logits,
    targets,
    nats,
    row_stride,
    target_stride,
    num_columns,
    share,
    twice_z_loss,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a table of logits has more than 2^31 numbers
    logits += row * row_stride
    target = tl.load(targets + row * target_stride)
    # Before any gradient is written: the sums below wait for every thread.
    picked = tl.load(logits + target, mask=(target >= 0) & (target < num_columns), other=float("nan")).to(tl.float32)
    if HAS_CAP:
        picked = cap * _bounded(picked, cap)
    columns = tl.arange(0, BLOCK)
    maximum = float("-inf")
    total = 0.0
    for start in range(0, num_columns, BLOCK):
        place = start + columns
        x = tl.load(logits + place, mask=place < num_columns, other=float("-inf")).to(tl.float32)
        if HAS_CAP:
            x = tl.where(place < num_columns, cap * _bounded(x, cap), float("-inf"))
        higher = tl.maximum(maximum, tl.max(x, axis=0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(x - higher), axis=0)
        maximum = higher
    log_total = tl.log(total) + maximum  # log(Z)
    tl.store(nats + row, log_total - picked)
    tl.store(nats + tl.num_programs(0) + row, log_total * log_total)
    factor = share * (1.0 + twice_z_loss * log_total) / total
    for start in range(0, num_columns, BLOCK):
        place = start + columns
        x = tl.load(logits + place, mask=place < num_columns, other=0.0).to(tl.float32)
        slope = 1.0
        if HAS_CAP:
            bounded = _bounded(x, cap)
            x = cap * bounded
            slope = 1.0 - bounded * bounded
        grad = (tl.exp(x - maximum) * factor - tl.where(place == target, share, 0.0)) * slope
        tl.store(logits + place, grad.to(logits.dtype.element_ty), mask=place < num_columns)
