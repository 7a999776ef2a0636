"""AdamW's update of one parameter on CUDA as one kernel, which a number on the device can forbid.

Weight, gradient and both moments are read once, and three of them written: 28 bytes for each number, where the lines of
`foreach_adamw_step` move 72. Since the kernel itself reads whether the step may be made, the host need not know before
it launches, so the device has the update to do while the host reads the loss.

Twin of `adamw_step_where`: `transformerlm.training.optim.adamw_step`
Beyond the twin: `may`, the number that can forbid the update
Test: tests/training/fast/test_adamw_kernel.py
Pays: 28 bytes for each number instead of 72, by arithmetic (docs/gpu.md); its speed is not measured yet
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def adamw_step_where(
    may: Tensor,
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Do what the plain form does, if `may`, an integer on the device, is 1 and not 0; all are fp32 without gaps."""
    beta1, beta2 = betas
    correction = math.sqrt(1.0 - beta2**step)
    with torch.cuda.device_of(weight):
        _adamw_kernel[(triton.cdiv(weight.numel(), _BLOCK),)](
            may,
            weight,
            grad,
            mean,
            square,
            weight.numel(),
            1.0 - lr * weight_decay,
            1.0 - beta1,
            1.0 - beta2,
            # Both corrections become numbers, as in `foreach_adamw_step`.
            -lr * correction / (1.0 - beta1**step),
            eps * correction,
            BLOCK=_BLOCK,
        )


@triton.jit
def _adamw_kernel(
    may,
    weights,
    grads,
    means,
    squares,
    size,
    kept,
    new_mean,
    new_square,
    rate,
    floor,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size * tl.load(may)
    grad = tl.load(grads + place, mask=mask, other=0.0)
    mean = tl.load(means + place, mask=mask, other=0.0)
    square = tl.load(squares + place, mask=mask, other=0.0)
    mean += new_mean * (grad - mean)
    square += new_square * (grad * grad - square)
    weight = kept * tl.load(weights + place, mask=mask, other=0.0) + rate * mean / (tl.sqrt(square) + floor)
    tl.store(means + place, mean, mask=mask)
    tl.store(squares + place, square, mask=mask)
    tl.store(weights + place, weight, mask=mask)
