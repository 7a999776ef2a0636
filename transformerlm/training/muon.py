"""Muon: momentum whose matrices are made orthogonal, and AdamW for everything that is not a hidden matrix.

    M <- momentum M + G                              momentum of the gradient G
    U  = G + momentum M                              Nesterov's look ahead
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(U)

`orthogonal(U)` keeps the singular vectors of U and sets its singular values to about 1, so that every direction of a
matrix learns at the same pace (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"). The
factor gives an update the root mean square of AdamW's, so that learning rate and weight decay are those of AdamW (Liu
et al. 2025, "Muon is scalable for LLM training", section 2.2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from transformerlm.models.transformer import TransformerLM
from transformerlm.training.optim import AdamW, Group, parameter_groups
from transformerlm.utils.dtypes import Precision
from transformerlm.utils.plain_forms import may_hand_over

# The root mean square of a usual AdamW update (Liu et al. 2025).
UPDATE_RMS = 0.2
# Five steps of the Polar Express (Amsel et al. 2025), each the best of its kind after those before it, with a margin of
# 2 % for rounding: they bring singular values in [0.001, 1] into [0.84, 1.15].
_MARGIN = 1.02
_COEFFICIENTS = (
    (8.156554, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def muon_step(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    precision: Precision = "fp32",
) -> None:
    """Update one matrix `(rows, columns)` and its momentum in place; `precision` is as in `Muon`."""
    buffer.mul_(momentum).add_(grad)
    update = grad + momentum * buffer  # U
    update = orthogonalize(update[None].to(_dtype_of_products(update, precision)))[0].to(update.dtype)
    weight.mul_(1.0 - lr * weight_decay)
    weight.sub_(lr * UPDATE_RMS * math.sqrt(max(weight.shape)) * update)


def foreach_muon_step(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    precision: Precision = "fp32",
) -> None:
    """Update many matrices as `muon_step` updates one; those of one shape are made orthogonal together.

    Item i of each list belongs to matrix i.
    """
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    updates = orthogonalize_all(list(torch._foreach_add(grads, buffers, alpha=momentum)), precision)
    if weight_decay:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
    torch._foreach_mul_(updates, [-lr * UPDATE_RMS * math.sqrt(max(update.shape)) for update in updates])
    torch._foreach_add_(weights, updates)


class Muon(AdamW):
    """Muon for the groups with `"orthogonal": True`, whose parameters are matrices, and AdamW for the others.

    `muon_groups` makes such groups. `precision` is that of the products inside `orthogonalize`; with "fp32" they are in
    the dtype of the momentum, at least fp32. Raises ValueError for values out of range, and for a parameter in an
    orthogonal group that is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        precision: Precision = "fp32",
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Muon: momentum must lie in [0, 1), got {momentum}")
        self._precision = precision
        super().__init__(params, lr, betas, eps, weight_decay)
        for group in self.param_groups:
            group.setdefault("orthogonal", False)
            group.setdefault("momentum", momentum)
            for p in group["params"] if group["orthogonal"] else ():
                if p.ndim != 2:
                    raise ValueError(f"Muon: an orthogonal group takes matrices only, got shape {tuple(p.shape)}")

    def can_step_where(self) -> bool:
        """Return whether there are no matrices to make orthogonal: that takes longer than a wait."""
        return super().can_step_where() and not any(group["orthogonal"] for group in self.param_groups)

    def _update(self, params: list[Tensor], weights: list[Tensor], grads: list[Tensor], group: Group) -> None:
        if not group["orthogonal"]:
            super()._update(params, weights, grads, group)
            return
        buffers = self._moments(params, "momentum_buffer")
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
        if may_hand_over():  # hand-over
            foreach_muon_step(weights, grads, buffers, **settings, precision=self._precision)
            return
        for weight, grad, buffer in zip(weights, grads, buffers, strict=True):
            muon_step(weight, grad, buffer, **settings, precision=self._precision)


def muon_groups(model: TransformerLM, *, weight_decay: float) -> list[Group]:
    """Return the groups of `parameter_groups` with the hidden matrices, those of the blocks, in a group of their own.

    AdamW updates embedding, output head and vectors, as Jordan et al. found best.
    """
    hidden = {id(p) for p in model.layers.parameters() if p.ndim == 2}
    groups = []
    for group in parameter_groups(model, weight_decay=weight_decay):
        for orthogonal in (True, False):
            params = [p for p in group["params"] if (id(p) in hidden) == orthogonal]
            groups.append({**group, "params": params, "orthogonal": orthogonal})
    return [group for group in groups if group["params"]]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices `(batch, rows, columns)` with their singular vectors and singular values of about 1.

    The iteration of Newton and Schulz, `X <- a X + (b S + c S S) X` with `S = X X^T`, changes the singular values alone
    and needs only products. The values must not exceed 1, so X begins as U over its Frobenius norm. Everything is
    computed in the dtype of `matrices`; a zero matrix stays zero.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # wide matrices make the smaller S
    norms = torch.linalg.matrix_norm(x, dtype=torch.promote_types(x.dtype, torch.float32), keepdim=True)
    x = x / (norms * _MARGIN).clamp(min=1e-30).to(x.dtype)
    for a, b, c in _COEFFICIENTS:
        square = torch.bmm(x, x.mT)  # S, (batch, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalize_all(matrices: list[Tensor], precision: Precision) -> list[Tensor]:
    """Return each matrix orthogonalized, in its dtype; matrices of one shape go through the products together."""
    places = defaultdict(list)
    for index, matrix in enumerate(matrices):
        places[matrix.shape, matrix.dtype, matrix.device].append(index)
    results = list(matrices)
    for indices in places.values():
        batch = torch.stack([matrices[index] for index in indices])
        batch = orthogonalize(batch.to(_dtype_of_products(batch, precision))).to(batch.dtype)  # (batch, rows, columns)
        for index, result in zip(indices, batch.unbind(), strict=True):
            results[index] = result
    return results


def _dtype_of_products(matrix: Tensor, precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else matrix.dtype
