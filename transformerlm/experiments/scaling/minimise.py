"""The minimum of the objective of `law.py` from many starts at once, in numpy: Levenberg and Marquardt's method.

Each start is a row of parameters `[log E', log A', alpha, ...]`, of which there are two for each variable. The law is
written as `log L = logsumexp(e, a - alpha x, b - beta z)`, where x and z are logarithms of N and D **less their mean**.
Then A' and alpha say different things: how high the term is in the middle of the data, and how steep. With the
logarithms as they are, a change of alpha is nearly the same as one of A, and most starts end far from the minimum.

Hoffmann et al. use L-BFGS. Here the Huber loss is a weighted square, with weights that follow the errors (Huber 1981,
chapter 7: iteratively reweighted least squares). A step solves five equations, and so each start needs tens of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transformerlm.experiments.scaling.law import DELTA, huber

Array = np.ndarray
_LONGEST_STEP = 2.0  # in each parameter, all of which are logarithms or exponents
_MOST_STUBBORN = 1e10  # the damping of a row that finds nothing lower
_CALM_STEPS = 3  # this many steps in a row that gain nothing end a row


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is fitted: `inputs` (n, k), the centred log N, log D, or one of them; `log_losses` (n,).

    `weights` (rows or 1, n) say how often each run counts in each row: all once, or as a bootstrap drew them.
    """

    inputs: Array
    log_losses: Array
    weights: Array
    delta: float = DELTA


def predicted(params: Array, inputs: Array) -> tuple[Array, Array]:
    """Return log L (rows, n) and the share of each of the 1 + k terms in L (rows, n, 1 + k).

    `params` (rows, 1 + 2k) are e, then the heights of the k terms, then their exponents. `inputs` are (n, k).
    """
    num_terms = inputs.shape[1]
    heights, exponents = params[:, None, 1 : 1 + num_terms], params[:, None, 1 + num_terms :]
    terms = np.empty((len(params), len(inputs), 1 + num_terms))
    terms[..., 0] = params[:, :1]
    terms[..., 1:] = heights - exponents * inputs
    highest = terms.max(axis=2, keepdims=True)
    shares = np.exp(terms - highest)
    total = shares.sum(axis=2, keepdims=True)
    return (highest + np.log(total))[..., 0], shares / total


def minimise(starts: Array, sample: Sample, *, most_steps: int = 500, tolerance: float = 1e-13) -> tuple[Array, Array]:
    """Return the parameters (rows, 1 + 2k) to which the starts of that shape lead, and their objectives (rows,).

    A row ends when three steps in a row lower its objective by less than `tolerance` of it.
    """
    params = starts.astype(np.float64)
    damping, calm = np.full(len(params), 1e-2), np.zeros(len(params), dtype=np.int64)
    objectives = _objectives(params, sample, rows=np.arange(len(params)))
    active = np.arange(len(params))
    for _ in range(most_steps):
        if not len(active):
            break
        tried = params[active] + _steps(params[active], sample, rows=active, damping=damping[active])
        found, before = _objectives(tried, sample, rows=active), objectives[active]
        is_lower = found <= before
        params[active[is_lower]], objectives[active[is_lower]] = tried[is_lower], found[is_lower]
        gains = np.where(is_lower, before - found, 0.0)
        damping[active] = np.clip(damping[active] * np.where(is_lower, 0.2, 5.0), 1e-12, 1e12)
        is_stubborn = ~is_lower & (damping[active] > _MOST_STUBBORN)
        is_calm = is_stubborn | (is_lower & (gains <= tolerance * before))
        calm[active] = np.where(is_calm, calm[active] + 1, np.where(is_lower, 0, calm[active]))
        active = active[calm[active] < _CALM_STEPS]
    return params, objectives


def _weights(sample: Sample, rows: Array) -> Array:
    return sample.weights if len(sample.weights) == 1 else sample.weights[rows]


def _objectives(params: Array, sample: Sample, *, rows: Array) -> Array:
    errors = predicted(params, sample.inputs)[0] - sample.log_losses
    total: Array = (_weights(sample, rows) * huber(errors, sample.delta)).sum(axis=1)
    return total


def _steps(params: Array, sample: Sample, *, rows: Array, damping: Array) -> Array:
    """Return a damped step for each row: the minimum of the weighted squares of the linearised errors."""
    log_losses, shares = predicted(params, sample.inputs)
    errors = log_losses - sample.log_losses
    slopes = np.concatenate([shares, -shares[..., 1:] * sample.inputs], axis=2)  # of log L, (rows, n, 1 + 2k)
    weights = _weights(sample, rows) * np.minimum(1, sample.delta / np.maximum(np.abs(errors), 1e-300))
    weighted = slopes * weights[..., None]
    gradients = np.einsum("rnp,rn->rp", weighted, errors)
    curvatures = weighted.transpose(0, 2, 1) @ slopes  # (rows, 1 + 2k, 1 + 2k)
    diagonals = np.einsum("rpp->rp", curvatures)
    # A term whose share is nothing has no curvature of its own: the second summand keeps the equations solvable.
    added = damping[:, None] * diagonals + 1e-12 * diagonals.max(axis=1, keepdims=True) + 1e-300
    curvatures = curvatures + added[:, :, None] * np.eye(params.shape[1])
    return np.clip(-np.linalg.solve(curvatures, gradients[..., None])[..., 0], -_LONGEST_STEP, _LONGEST_STEP)
