"""The best size for a budget: where the loss of the law is lowest among all N and D that cost the same.

A budget is in FLOPs or in seconds of a machine, and a token costs `scale * N^power` of it. By the usual rule of thumb,
C = 6 N D, the power is 1. Of runs that were made, both are measured: a head and attention cost FLOPs that N does not
count, and a machine computes small matrices more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transformerlm.experiments.scaling.law import ScalingLaw
from transformerlm.experiments.scaling.points import FLOPS_PER_PARAMETER

Array = np.ndarray
_FAR = 3.0  # a deviation of the costs from their law by more than this factor is no law


@dataclass(frozen=True)
class Cost:
    """What a token costs a model of N parameters: `scale * N ** power`, in `unit`."""

    unit: str
    scale: float = FLOPS_PER_PARAMETER
    power: float = 1.0

    def of(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Return the cost of training with these numbers of parameters and tokens."""
        return np.asarray(self.scale * np.asarray(parameters, dtype=np.float64) ** self.power * tokens)


def measured_cost(unit: str, parameters: Array, per_token: Array) -> Cost | None:
    """Return the power law through costs per token (n,); None where it would be no law of the size.

    Needs two sizes at least.
    """
    if len(np.unique(parameters)) < 2 or not np.all(np.isfinite(per_token) & (per_token > 0)):
        return None
    x, y = np.log(parameters), np.log(per_token)
    power, level = np.polyfit(x, y, 1)
    is_off = np.abs(y - power * x - level).max() > np.log(_FAR)
    return None if is_off or power <= 0 else Cost(unit, float(np.exp(level)), float(power))


def best_size(law: ScalingLaw, cost: Cost, budget: float) -> tuple[Array, Array]:
    """Return the N and D of the lowest loss for a budget; of a bootstrap's laws, arrays.

    With D = budget / (scale N^power), the derivative of the loss by N is 0 at

        N^(alpha + power beta) = alpha A / (power beta B) * (budget / scale)^beta

    They are NaN for a law in which more parameters or more tokens would not help.
    """
    A, B, alpha, beta = (np.asarray(one, dtype=np.float64) for one in (law.A, law.B, law.alpha, law.beta))
    with np.errstate(all="ignore"):
        log_ratio = np.log(alpha * A) - np.log(cost.power * beta * B)
        log_size = (log_ratio + beta * np.log(budget / cost.scale)) / (alpha + cost.power * beta)
        is_law = (alpha > 0) & (beta > 0)
        parameters = np.where(is_law, np.exp(log_size), np.nan)
        return parameters, budget / (cost.scale * parameters**cost.power)


def budget_of_tokens(law: ScalingLaw, cost: Cost, tokens: float) -> float:
    """Return the budget whose best size is trained on this number of tokens.

    It follows from the same derivative: `alpha A / N^alpha = power beta B / D^beta`.
    """
    with np.errstate(all="ignore"):
        log_size = np.log(law.alpha * law.A) - np.log(cost.power * law.beta * law.B) + law.beta * np.log(tokens)
        return float(cost.of(np.exp(log_size / law.alpha), tokens))


def edge_of(value: float, measured: Array) -> str | None:
    """Return "above" or "below" where a value is not inside of what was measured (n,); None inside.

    A value at the very edge is not inside: the lowest loss may be beyond it.
    """
    if value >= measured.max():
        return "above"
    return "below" if value <= measured.min() else None
