"""The scaling law of Hoffmann et al. 2022 (arXiv 2203.15556), and what its fit minimises: the plain form.

    L(N, D) = E + A / N^alpha + B / D^beta

N is the number of parameters, D the number of training tokens, L the loss at the end of a whole schedule. E is the loss
that no model gets below, the second term is the price of a model that is not larger, the third that of data that are
not more.

`fit.py` finds the law; this file is what it must find. The objective is the third approach of that paper: the Huber
loss of the error of log L, which lets a run that went wrong pull no harder than others. It is the sum over the runs.
The mean made the optimiser of the paper stop too early, as Besiroglu et al. 2024 (arXiv 2404.10102) found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
DELTA = 1e-3
"""Errors of log L above this count by their size, those below it by their square."""


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The five constants; with A = 0 the law is one of tokens alone, with B = 0 one of parameters alone.

    A bootstrap's constants are arrays (resamples, 1), one law for each resample.
    """

    E: Array | float
    A: Array | float = 0.0
    B: Array | float = 0.0
    alpha: Array | float = 0.0
    beta: Array | float = 0.0

    def loss(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Return the loss for each run (n,), or of each law for each run (resamples, n).

        It is in the unit of the losses that the law was fitted to. What a law of one variable does not need may be NaN.
        """
        N, D = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.E + self.A / N**self.alpha + self.B / D**self.beta)


def huber(errors: Array, delta: float = DELTA) -> Array:
    """Return the Huber loss of each error: half its square up to `delta`, a straight line from there (Huber 1964)."""
    size = np.abs(errors)
    straight: Array = delta * (size - delta / 2)
    return np.where(size <= delta, errors**2 / 2, straight)


def objective(law: ScalingLaw, parameters: Array, tokens: Array, losses: Array, *, delta: float = DELTA) -> float:
    """Return what a fit minimises: the sum of the Huber losses of log L over runs (n,)."""
    return float(huber(np.log(law.loss(parameters, tokens)) - np.log(losses), delta).sum())
