"""SGD and AdamW from scratch, gradient clipping by norm, and the choice of which parameters decay.

Stochastic gradient descent with momentum (Polyak 1964), for the gradient g:

    v <- momentum v + g + weight_decay w
    w <- w - lr v

AdamW (Loshchilov & Hutter 2019, algorithm 2; the decay is scaled by the learning rate), for the gradient g of step t:

    w <- (1 - lr weight_decay) w
    m <- beta1 m + (1 - beta1) g                     mean of the gradients
    v <- beta2 v + (1 - beta2) g^2                   mean of their squares
    w <- w - lr m' / (sqrt(v') + eps)                m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)

m and v begin as 0, so early means are too small; m' and v' correct that. `adamw_step` is this for one parameter,
`foreach_adamw_step` the same for a list of them, with fewer passes over memory.

Updates and states are fp32, or fp64 for parameters in fp64. On a GPU an update of AdamW covers all parameters in a few
kernels, or, where Triton works, takes one kernel for each, which itself asks whether the step may be made
(`fast/adamw_kernel.py`). On a CPU it goes one parameter at a time, which stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from inspect import unwrap
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transformerlm.utils.dtypes import upcast
from transformerlm.utils.plain_forms import may_hand_over
from transformerlm.utils.triton_kernels import can_launch

Group = dict[str, Any]
_NUMBERS_AT_ONCE = 1 << 26  # of a device's parameters in one update, which has a temporary tensor of each


def sgd_step(
    weight: Tensor, grad: Tensor, velocity: Tensor | None, *, lr: float, momentum: float, weight_decay: float
) -> None:
    """Update one parameter and its velocity (None: no momentum) in place, all of one shape."""
    if weight_decay:
        grad = grad.add(weight, alpha=weight_decay)
    if velocity is not None:
        grad = velocity.mul_(momentum).add_(grad)
    weight.sub_(grad, alpha=lr)


def adamw_step(
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
    """Update one parameter and its two moments in place, all of one shape; `step` counts from 1."""
    beta1, beta2 = betas
    weight.mul_(1.0 - lr * weight_decay)
    mean.mul_(beta1).add_(grad, alpha=1.0 - beta1)
    square.mul_(beta2).add_(grad.square(), alpha=1.0 - beta2)
    unbiased_mean = mean / (1.0 - beta1**step)
    unbiased_square = square / (1.0 - beta2**step)
    weight.sub_(lr * unbiased_mean / (unbiased_square.sqrt() + eps))


def foreach_adamw_step(
    weights: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    steps: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update many parameters as `adamw_step` updates one; on a GPU each line is one kernel for all of them.

    Item i of each list belongs to parameter i, and `steps[i]` counts from 1.
    """
    beta1, beta2 = betas
    if weight_decay:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
    torch._foreach_lerp_(means, grads, 1.0 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
    # With c = sqrt(1 - beta2^t), m' / (sqrt(v') + eps) = c / (1 - beta1^t) m / (sqrt(v) + c eps): both corrections are
    # numbers, not tensors (Kingma & Ba 2015, section 2, before 2.1), which saves a pass over memory.
    corrections = [math.sqrt(1.0 - beta2**step) for step in steps]
    rates = [-lr * correction / (1.0 - beta1**step) for step, correction in zip(steps, corrections, strict=True)]
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_add_(denominators, [eps * correction for correction in corrections])
    torch._foreach_addcdiv_(weights, means, denominators, rates)


class _WideStateOptimizer(Optimizer):
    """What all optimizers here share: the walk over the parameters, and states in at least fp32, also after loading."""

    # torch hides these from its compiler, and imports it for that, which takes a second or two and 100 MB.
    add_param_group = unwrap(Optimizer.add_param_group)
    state_dict = unwrap(Optimizer.state_dict)
    zero_grad = unwrap(Optimizer.zero_grad)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; `closure`, if given, recomputes the loss and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in self._buckets([p for p in group["params"] if p.grad is not None], group):
                weights = [upcast(p) for p in bucket]  # the parameters themselves unless they are halves
                self._update(bucket, weights, [upcast(_dense_grad(p)) for p in bucket], group)
                for p, weight in zip(bucket, weights, strict=True):
                    if weight is not p:
                        p.copy_(weight)
        return loss

    def __repr__(self) -> str:
        """Return the kind, and each group's number of tensors and numbers with its settings."""
        groups = [
            f"{len(group['params'])} tensors of {sum(p.numel() for p in group['params']):,} numbers, "
            + ", ".join(f"{name}={value}" for name, value in group.items() if name != "params")
            for group in self.param_groups
        ]
        return f"{type(self).__name__}({'; '.join(groups)})"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; unlike torch's own method, this does not round moments to the parameters' dtype."""
        unwrap(Optimizer.load_state_dict)(self, state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for p, index in zip(params, indices, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, _wide(p), copy=True)

    def _update(self, params: list[Tensor], weights: list[Tensor], grads: list[Tensor], group: Group) -> None:
        """Change `weights` in place; `params` are the keys of the state."""
        raise NotImplementedError

    def _buckets(self, params: list[Tensor], group: Group) -> list[list[Tensor]]:
        """Return the parameters of a group in lists that are updated together."""
        return _buckets(params)

    def _moments(self, params: list[Tensor], name: str) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, dtype=_wide(p), memory_format=torch.preserve_format)
        return [self.state[p][name] for p in params]


class SGD(_WideStateOptimizer):
    """Stochastic gradient descent with optional momentum: `sgd_step` for every parameter.

    The decay is part of the gradient, as in torch.optim.SGD. Raises ValueError for values out of range.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, params: list[Tensor], weights: list[Tensor], grads: list[Tensor], group: Group) -> None:
        velocities = self._moments(params, "momentum_buffer") if group["momentum"] else [None] * len(params)
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
        for weight, grad, velocity in zip(weights, grads, velocities, strict=True):
            sgd_step(weight, grad, velocity, **settings)


class AdamW(_WideStateOptimizer):
    """Adam with decoupled weight decay: `adamw_step` for every parameter.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay)
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"AdamW: betas must lie in [0, 1), got {tuple(betas)}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def can_step_where(self) -> bool:
        """Return whether `step_where` works: on CUDA, with Triton, in fp32, from the second step on."""
        return may_hand_over() and all(self._is_for_the_kernel(p) for _, p in self._with_gradients())

    def step_where(self, may: Tensor, *, lr: float) -> None:
        """Update where `may`, a truth value on the device, is true, without a wait for it; nothing else changes.

        Call `count_step` when it was true. Ask `can_step_where` first.
        """
        from transformerlm.training.fast.adamw_kernel import adamw_step_where  # hand-over

        number = may.to(torch.int32)
        for group, p in self._with_gradients():
            state, settings = self.state[p], {name: group[name] for name in ("betas", "eps", "weight_decay")}
            tensors = p.detach(), _dense_grad(p), state["exp_avg"], state["exp_avg_sq"]
            adamw_step_where(number, *tensors, step=state["step"] + 1, lr=lr, **settings)

    def count_step(self) -> None:
        """Count what `step_where` has done."""
        self._count_steps([p for _, p in self._with_gradients()])

    def _with_gradients(self) -> Iterator[tuple[Group, Tensor]]:
        for group in self.param_groups:
            yield from ((group, p) for p in group["params"] if p.grad is not None)

    def _is_for_the_kernel(self, p: Tensor) -> bool:
        state = self.state.get(p, {})
        tensors = [p, _dense_grad(p), *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]
        is_plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in tensors)
        return len(tensors) == 4 and is_plain and all(can_launch(each) for each in tensors)

    def _update(self, params: list[Tensor], weights: list[Tensor], grads: list[Tensor], group: Group) -> None:
        means, squares = self._moments(params, "exp_avg"), self._moments(params, "exp_avg_sq")
        steps = self._count_steps(params)
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        if may_hand_over():  # hand-over
            foreach_adamw_step(weights, grads, means, squares, steps=steps, **settings)
            return
        for *tensors, step in zip(weights, grads, means, squares, steps, strict=True):
            adamw_step(*tensors, step=step, **settings)

    def _count_steps(self, params: list[Tensor]) -> list[int]:
        for p in params:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return [self.state[p]["step"] for p in params]


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, *, eps: float = 1e-6) -> Tensor:
    """Scale all gradients by one factor so that their joint L2 norm is at most `max_norm`; never scale up.

    Returns the norm before clipping, a scalar in at least fp32 (Pascanu et al. 2013). Parameters without a gradient are
    skipped. Nothing waits for the device. Where the norm is not finite, the gradients are not either: check it.
    """
    parameters = list(parameters)
    total = grad_norm(parameters)
    scale_gradients(parameters, max_norm, total, eps=eps)
    return total


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the joint L2 norm of all gradients, a scalar in at least fp32."""
    grads = [_dense_grad(p) for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2, dtype=reduce(torch.promote_types, map(_wide, grads)))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def scale_gradients(parameters: Iterable[Tensor], max_norm: float, total: Tensor, *, eps: float = 1e-6) -> None:
    """Scale all gradients, whose joint norm is `total`, as `clip_grad_norm` does."""
    grads = [_dense_grad(p) for p in parameters if p.grad is not None]
    if not grads:
        return
    factor = (max_norm / (total + eps)).clamp(max=1.0)
    if grads[0].device.type == "cpu":
        for grad in grads:
            grad.mul_(factor)
    else:
        torch._foreach_mul_(grads, factor)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[Group]:
    """Split the trainable parameters: matrices (the embedding too) decay, vectors such as norm weights do not.

    A weight that is tied to another is in one group once.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _buckets(params: list[Tensor]) -> list[list[Tensor]]:
    """Return CPU parameters one at a time, and a device's in lists small enough for an update's temporaries."""
    buckets: list[list[Tensor]] = []
    room = -1
    for p in params:
        if p.device.type == "cpu" or p.numel() > room:
            buckets.append([])
            room = _NUMBERS_AT_ONCE
        buckets[-1].append(p)
        room = -1 if p.device.type == "cpu" else room - p.numel()
    return buckets


def _dense_grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(
            f"optimizer: a parameter of shape {tuple(p.shape)} has a sparse gradient, expected a dense one"
        )
    return grad


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"optimizer: {name} must be at least 0, got {value}")
