"""The losses of training: cross-entropy of logits, and what a step minimises, from the vectors before the head.

    cross_entropy = mean over tokens of -log softmax(logits)[target]
    training_loss = cross_entropy + z_loss * mean over tokens of log(sum(exp(logits)))^2,   logits = hidden weight^T

Both compute in at least fp32.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from transformerlm.models import functional
from transformerlm.training.fast.linear_cross_entropy import training_loss as fast_training_loss
from transformerlm.utils.dtypes import upcast
from transformerlm.utils.plain_forms import may_hand_over

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Return the negative log-likelihood of `targets` `(...)` under `logits` `(..., vocab)`, in nats, in fp32.

    "mean" and "sum" give a scalar, "none" the shape of `targets`. Raises ValueError when the shapes do not match or the
    reduction is unknown.
    """
    if logits.shape[:-1] != targets.shape:
        expected, found = tuple(logits.shape[:-1]), tuple(targets.shape)
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)} need targets {expected}, got {found}")
    nats = functional.token_nats(logits, targets)  # the shape of targets
    if reduction == "mean":
        return nats.mean()
    if reduction == "sum":
        return nats.sum()
    if reduction != "none":
        raise ValueError(f"cross_entropy: reduction must be mean, sum or none, got {reduction!r}")
    return nats


def training_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, soft_cap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of the logits, and what to minimise: the mean of it plus `z_loss * log(Z)^2`.

    The logits of `hidden` `(..., d_model)` are `hidden weight^T` with `weight` `(vocab, d_model)`, bounded by
    `functional.soft_cap` where a cap is given; Z is the sum of a token's `exp(logits)`. The second term keeps Z near 1,
    so that logits do not drift (Chowdhery et al. 2022, "PaLM", section 5, with the weight 1e-4). Both results are fp32
    scalars, and gradients flow from the second alone. The fast form allows one backward pass: a second one, with
    `retain_graph` too, raises RuntimeError. Raises ValueError when the shapes do not match.
    """
    if hidden.shape[:-1] != targets.shape:
        expected, found = tuple(hidden.shape[:-1]), tuple(targets.shape)
        raise ValueError(f"training_loss: vectors {tuple(hidden.shape)} need targets {expected}, got {found}")
    if may_hand_over():  # hand-over
        return fast_training_loss(hidden, weight, targets, soft_cap=soft_cap, z_loss=z_loss)
    logits = hidden @ weight.T  # (..., vocab)
    if soft_cap is not None:
        logits = functional.soft_cap(logits, soft_cap)
    nats = cross_entropy(logits, targets)
    log_z = upcast(logits).logsumexp(dim=-1)  # (...)
    return nats.detach(), nats + z_loss * log_z.square().mean()
