"""The training loss straight from the vectors before the output head, so that logits never exist all at once.

With a big vocabulary the logits `(tokens, vocab)` are a language model's largest tensor, their gradient is another one,
and fp32 doubles both. Here they are made for some tokens at a time and turned into their own gradient in place, which
the head's two backward products use at once (as in Liger Kernel, Hsu et al. 2024). So there is one buffer of logits,
for a few tokens, and each exponential is computed once. The fp32 work goes in blocks that fit the processor's cache; on
CUDA one kernel does it, `loss_kernel.py`.

Twin of `training_loss`: `transformerlm.training.loss.training_loss`
Test: tests/training/fast/test_linear_cross_entropy.py
Pays: 1.68x the speed in fp32, 3.7x in bf16, for 4,096 tokens and 10,000 logits, one thread (docs/LOG.md);
  on CUDA the kernel moves 4 bytes a bf16 logit, not 44, by arithmetic (docs/gpu.md): its speed is not measured yet
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformerlm.utils.dtypes import cast_for_matmul, upcast
from transformerlm.utils.row_blocks import logits_at_once, row_blocks
from transformerlm.utils.triton_kernels import can_launch


def training_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, soft_cap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of `hidden weight^T`, and what to minimise, as the plain form does.

    The gradients are computed on the way, and the backward pass scales them in place: it can be made once.
    """
    rows = cast_for_matmul(hidden).reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(rows, weight, targets.reshape(-1), soft_cap, z_loss, weight.requires_grad)  # type: ignore[no-untyped-call,no-any-return]


class _HeadLoss(torch.autograd.Function):
    """Both losses; the gradients are computed on the way, and scaled in the backward pass.

    With D the gradient of the logits: `d hidden = D weight`, `d weight = D^T hidden`, if the weight `learns`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        soft_cap: float | None,
        z_loss: float,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        cast_weight = weight.to(hidden.dtype)  # (vocab, d_model)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight) if learns else None
        sums = hidden.new_zeros(2, dtype=upcast(hidden[:0]).dtype)
        num_rows = max(1, logits_at_once(hidden.device.type) // len(weight))
        for start in range(0, len(hidden), num_rows):
            chunk = slice(start, start + num_rows)
            logits = hidden[chunk] @ cast_weight.T  # (chunk, vocab): the only tensor of this size
            _replace_by_gradient(logits, targets[chunk], sums, len(hidden), soft_cap, z_loss)
            # The logits are their own gradient now.
            torch.mm(logits, cast_weight, out=grad_hidden[chunk])  # (chunk, d_model)
            if grad_weight is not None:
                grad_weight += logits.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        entropy, square = sums / len(hidden)
        ctx.mark_non_differentiable(entropy)
        return entropy, entropy + z_loss * square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        if getattr(ctx, "is_spent", False):
            raise RuntimeError("training_loss: expected one backward pass, found a second; compute the loss again")
        grad_hidden, grad_weight = ctx.saved_tensors
        ctx.is_spent = True
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad)
        return grad_hidden.mul_(grad), grad_weight, None, None, None, None


def _replace_by_gradient(
    logits: Tensor, targets: Tensor, sums: Tensor, num_rows: int, soft_cap: float | None, z_loss: float
) -> None:
    """Put the gradient of the mean over `num_rows` rows in place of the logits; add up both terms in `sums` `(2)`."""
    if can_launch(logits):
        from transformerlm.training.fast.loss_kernel import replace_by_gradient

        sums += replace_by_gradient(logits, targets, num_rows=num_rows, soft_cap=soft_cap, z_loss=z_loss)
        return
    for block in row_blocks(logits):
        sums += _replace_block(logits[block], targets[block], num_rows, soft_cap, z_loss)


def _replace_block(logits: Tensor, targets: Tensor, num_rows: int, soft_cap: float | None, z_loss: float) -> Tensor:
    """Put the gradient in place of some rows of logits, by the formulas; return the sums of both terms.

    With p the softmax, it is `(p (1 + 2 z_loss log(Z)) - one_hot(target)) / num_rows`, times the slope of the soft cap.
    """
    wide, places = upcast(logits), targets.unsqueeze(-1)  # (rows, vocab), (rows, 1)
    if soft_cap is not None:
        bounded = torch.tanh(wide / soft_cap)
        wide = bounded * soft_cap
    picked, maximum = wide.gather(-1, places), wide.amax(dim=-1, keepdim=True)  # (rows, 1) each
    total = wide.sub_(maximum).exp_().sum(dim=-1, keepdim=True)  # wide holds the exponentials from here on
    log_total = total.log() + maximum  # log(Z), (rows, 1)
    wide.mul_((1.0 + 2.0 * z_loss * log_total) / (total * num_rows))
    wide.scatter_add_(-1, places, torch.full_like(picked, -1.0 / num_rows))
    if soft_cap is not None:
        wide.mul_(1.0 - bounded.square_())  # the slope of cap * tanh(x / cap) is 1 - tanh^2
    if wide is not logits:
        logits.copy_(wide)
    return torch.stack(((log_total - picked).sum(), log_total.square().sum()))
