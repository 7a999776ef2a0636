"""Cross-entropy in fp32, without ever holding a table of probabilities as large as the logits.

The rows are worked off in blocks that fit the processor's cache: on a CPU this is several times faster than the same
formula over the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.dtypes import upcast

Reduction = Literal["mean", "sum", "none"]

# Logits in a block: a few MB on a CPU; on other devices only a bound on the temporary memory.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_DEFAULT_BLOCK_ELEMENTS = 2**27


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Return the negative log-likelihood of `targets` `(...)` under `logits` `(..., vocab)`, in nats, in fp32.

    "mean" and "sum" give a scalar, "none" the shape of `targets`. Raises ValueError when the shapes do not match or the
    reduction is unknown.
    """
    losses, _ = _losses_and_log_totals(logits, targets)
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction != "none":
        raise ValueError(f"cross_entropy: reduction must be mean, sum or none, got {reduction!r}")
    return losses.view(targets.shape)


def training_loss(logits: Tensor, targets: Tensor, *, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy, and what to minimise: the mean of `cross-entropy + z_loss * log(Z)^2`, in fp32.

    Z is the sum of a row's `exp(logits)`; the second term keeps it near 1, so that logits do not drift (Chowdhery et
    al. 2022, "PaLM", section 5, with the weight 1e-4). With weight 0 both are the same. Raises ValueError as
    `cross_entropy` does.
    """
    losses, log_totals = _losses_and_log_totals(logits, targets)
    mean = losses.mean()
    return mean, mean + z_loss * log_totals.square().mean() if z_loss else mean


def _losses_and_log_totals(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's negative log-likelihood and `log(Z)`, both flat."""
    if logits.shape[:-1] != targets.shape:
        expected, found = tuple(logits.shape[:-1]), tuple(targets.shape)
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)} need targets {expected}, got {found}")
    rows, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula itself
        return _negative_log_likelihood(rows, flat_targets)
    return _BlockedCrossEntropy.apply(rows, flat_targets)  # type: ignore[no-untyped-call,no-any-return]


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log(sum(exp(logits))) - logits[target]` and the first term, each `(rows)`."""
    wide = upcast(logits)
    maximum = wide.amax(dim=-1, keepdim=True).detach()
    log_total = (wide - maximum).exp_().sum(dim=-1).log() + maximum.squeeze(-1)
    return log_total - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1), log_total


class _BlockedCrossEntropy(torch.autograd.Function):
    """The loss and log(Z) of each row, with the gradients `softmax(logits) - one_hot(target)` and `softmax(logits)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(logits), device=logits.device, dtype=upcast(logits[:0]).dtype)
        log_totals = torch.empty_like(losses)
        for block in _blocks(logits):
            losses[block], log_totals[block] = _negative_log_likelihood(logits[block], targets[block])
        ctx.save_for_backward(logits, targets, log_totals)
        return losses, log_totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, grad_log_totals: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_totals = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        scales = grad_losses + grad_log_totals  # the latter are zeros where log(Z) is not used
        for block in _blocks(logits):
            grad = logits[block].to(log_totals.dtype, copy=True)
            grad.sub_(log_totals[block].unsqueeze(-1)).exp_().mul_(scales[block].unsqueeze(-1))
            grad_logits[block] = grad.scatter_add_(-1, targets[block].unsqueeze(-1), -grad_losses[block].unsqueeze(-1))
        return grad_logits, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    elements = _BLOCK_ELEMENTS.get(logits.device.type, _DEFAULT_BLOCK_ELEMENTS)
    num_rows = max(1, elements // logits.shape[-1])
    return (slice(start, start + num_rows) for start in range(0, len(logits), num_rows))
