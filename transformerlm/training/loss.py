"""Cross-entropy in fp32, without ever holding a table of probabilities as large as the logits.

The rows are worked off in blocks that fit the processor's cache: on a CPU this is several times faster than the same
formula over the whole tensor.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.dtypes import upcast
from transformerlm.utils.row_blocks import row_blocks

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Return the negative log-likelihood of `targets` `(...)` under `logits` `(..., vocab)`, in nats, in fp32.

    "mean" and "sum" give a scalar, "none" the shape of `targets`. Raises ValueError when the shapes do not match or the
    reduction is unknown.
    """
    if logits.shape[:-1] != targets.shape:
        expected, found = tuple(logits.shape[:-1]), tuple(targets.shape)
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)} need targets {expected}, got {found}")
    rows, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula itself
        losses = _negative_log_likelihood(rows, flat_targets)[0]
    else:
        losses = _BlockedCrossEntropy.apply(rows, flat_targets)  # type: ignore[no-untyped-call]
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction != "none":
        raise ValueError(f"cross_entropy: reduction must be mean, sum or none, got {reduction!r}")
    return losses.view(targets.shape)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log(sum(exp(logits))) - logits[target]` and the first term, each `(rows)`."""
    wide = upcast(logits)
    maximum = wide.amax(dim=-1, keepdim=True).detach()
    log_total = (wide - maximum).exp_().sum(dim=-1).log() + maximum.squeeze(-1)
    return log_total - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1), log_total


class _BlockedCrossEntropy(torch.autograd.Function):
    """The loss of each row; its gradient is `softmax(logits) - one_hot(target)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(logits), device=logits.device, dtype=upcast(logits[:0]).dtype)
        log_totals = torch.empty_like(losses)
        for block in row_blocks(logits):
            losses[block], log_totals[block] = _negative_log_likelihood(logits[block], targets[block])
        ctx.save_for_backward(logits, targets, log_totals)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_totals = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for block in row_blocks(logits):
            scale = grad_losses[block].unsqueeze(-1)
            grad = logits[block].to(log_totals.dtype, copy=True)
            grad.sub_(log_totals[block].unsqueeze(-1)).exp_().mul_(scale)
            grad_logits[block] = grad.scatter_add_(-1, targets[block].unsqueeze(-1), -scale)
        return grad_logits, None
