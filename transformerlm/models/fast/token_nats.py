"""The loss of each token with a backward pass of its own, a block of rows at a time.

Autograd would keep a table of exponentials as large as the logits. Here the logits alone are kept, with one number a
row, and each block of rows stays in the processor's cache.

Twin of `token_nats`: `transformerlm.models.functional.token_nats`
Test: tests/models/fast/test_token_nats.py
Pays: 87 ms to 45 for 1,024 tokens of 10,000 logits forward and backward, 42 to 11 forward alone (docs/LOG.md)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.dtypes import upcast
from transformerlm.utils.row_blocks import row_blocks


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `-log softmax(logits)[target]` of each target `(...)` under logits `(..., vocab)`, in nats."""
    rows, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    losses: Tensor = _TokenNats.apply(rows, flat_targets)  # type: ignore[no-untyped-call]
    return losses.view(targets.shape)


class _TokenNats(torch.autograd.Function):
    """The loss of each row; its gradient is `softmax(logits) - one_hot(target)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(logits), device=logits.device, dtype=upcast(logits[:0]).dtype)
        log_totals = torch.empty_like(losses)  # log(sum(exp(logits))), (rows)
        for block in row_blocks(logits):
            wide, places = upcast(logits[block]), targets[block].unsqueeze(-1)  # (block, vocab), (block, 1)
            maximum = wide.amax(dim=-1, keepdim=True)
            log_total = (wide - maximum).exp_().sum(dim=-1).log() + maximum.squeeze(-1)
            losses[block], log_totals[block] = log_total - wide.gather(-1, places).squeeze(-1), log_total
        ctx.save_for_backward(logits, targets, log_totals)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_totals = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for block in row_blocks(logits):
            scale = grad_losses[block].unsqueeze(-1)  # (block, 1)
            grad = logits[block].to(log_totals.dtype, copy=True)
            grad.sub_(log_totals[block].unsqueeze(-1)).exp_().mul_(scale)  # the softmax, scaled
            grad_logits[block] = grad.scatter_add_(-1, targets[block].unsqueeze(-1), -scale)
        return grad_logits, None
