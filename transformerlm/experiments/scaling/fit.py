"""The law that fits runs best, and how sure that is: starts from a grid, and a bootstrap over the runs.

The objective is in `law.py`, the way to its minimum in `minimise.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np

from transformerlm.experiments.scaling.law import DELTA, ScalingLaw
from transformerlm.experiments.scaling.minimise import Sample, minimise
from transformerlm.experiments.scaling.points import Points

Array = np.ndarray
Kind = Literal["both", "tokens", "parameters"]
"""The variables of a law: N and D, D alone, or N alone."""
_EXPONENTS = (0.1, 0.3, 0.6)
_SHARES_OF_E = (0.1, 0.5, 0.9)  # of the lowest loss
_SHARES_OF_A = (0.2, 0.5, 0.8)  # of what is above E
_SAME = 1e-6  # objectives that differ by less than this of them are one minimum
_BLOCK_NUMBERS = 200_000  # of one array in a bootstrap: what a CPU's cache holds


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with the points that it was fitted to.

    `objective` is at the minimum, which `reached` of the `starts` led to. `resampled` has one law for each resample.
    """

    kind: Kind
    law: ScalingLaw
    points: Points
    objective: float
    starts: int
    reached: int
    resampled: ScalingLaw | None = None
    seed: int = 0

    @property
    def errors(self) -> Array:
        """The error of each point's log loss (n,): what was measured less what the law gives."""
        points = self.points
        return np.asarray(np.log(points.losses) - np.log(self.law.loss(points.parameters, points.tokens)))


def fit_law(points: Points, kind: Kind = "both", *, resamples: int = 0, seed: int = 0, delta: float = DELTA) -> Fit:
    """Return the law with the lowest objective, from all starts of the grid, and `resamples` laws of a bootstrap.

    Each resample weighs the runs anew, by chance, and goes on from the law of all runs.
    """
    inputs, middle = _centred(points, kind)
    sample = Sample(inputs=inputs, log_losses=np.log(points.losses), weights=np.ones((1, len(points))), delta=delta)
    starts = _starts(points.losses, inputs.shape[1])
    params, objectives = minimise(starts, sample)
    best = int(np.argmin(objectives))
    reached = int(np.sum(objectives <= objectives[best] * (1 + _SAME) + 1e-25))
    resampled = None
    if resamples:
        weights = _draw_weights(resamples, len(points), np.random.default_rng(seed))
        resampled = _as_law(_resample(params[best], sample, weights), middle, kind)
    return Fit(
        kind=kind,
        law=_as_law(params[best], middle, kind),
        points=points,
        objective=float(objectives[best]),
        starts=len(starts),
        reached=reached,
        resampled=resampled,
        seed=seed,
    )


def _centred(points: Points, kind: Kind) -> tuple[Array, Array]:
    """Return the law's variables as logarithms less their mean (n, k), and the means (k,)."""
    columns = {"parameters": [points.parameters], "tokens": [points.tokens]}
    columns["both"] = columns["parameters"] + columns["tokens"]
    logs = np.log(np.stack(columns[kind], axis=1))
    middle = logs.mean(axis=0)
    return logs - middle, middle


def _starts(losses: Array, num_terms: int) -> Array:
    """Return a grid of parameters (81 for two terms, 9 for one) with each term's height and steepness."""
    heights = []
    for of_e, of_a in product(_SHARES_OF_E, _SHARES_OF_A if num_terms > 1 else (1.0,)):
        floor = of_e * losses.min()
        rest = np.median(losses) - floor
        heights.append(np.log([floor, of_a * rest, (1 - of_a) * rest][: 1 + num_terms]))
    return np.array(
        [[*height, *exponents] for height in heights for exponents in product(_EXPONENTS, repeat=num_terms)]
    )


def _as_law(params: Array, middle: Array, kind: Kind) -> ScalingLaw:
    """Return the law of parameters (1 + 2k,), or the laws of (resamples, 1 + 2k)."""
    num_terms = len(middle)
    exponents = params[..., 1 + num_terms :]
    factors = np.exp(params[..., 1 : 1 + num_terms] + exponents * middle)

    def column(numbers: Array) -> Array | float:
        return float(numbers) if params.ndim == 1 else numbers[:, None]

    names = {"both": ("A", "B"), "tokens": ("B",), "parameters": ("A",)}[kind]
    constants = {"E": column(np.exp(params[..., 0]))}
    for place, name in enumerate(names):
        constants[name] = column(factors[..., place])
        constants["alpha" if name == "A" else "beta"] = column(exponents[..., place])
    return ScalingLaw(**constants)


def _draw_weights(resamples: int, number: int, rng: np.random.Generator) -> Array:
    """Return how much each run counts in each resample (resamples, n), n in all: Rubin's Bayesian bootstrap (1981).

    The usual bootstrap draws whole runs, and of 12 or 25 it often draws none of a size, so that its intervals are too
    wide. These weights have the same variance, and no run is ever gone.
    """
    weights = rng.exponential(size=(resamples, number))
    return np.asarray(weights * (number / weights.sum(axis=1, keepdims=True)))


def _resample(best: Array, sample: Sample, weights: Array) -> Array:
    """Return the parameters of each resample (resamples, 1 + 2k), from the minimum for all runs."""
    size = max(1, _BLOCK_NUMBERS // (sample.inputs.shape[0] * len(best)))
    blocks = []
    for begin in range(0, len(weights), size):
        block = replace(sample, weights=weights[begin : begin + size])
        starts = np.repeat(best[None], len(block.weights), axis=0)
        blocks.append(minimise(starts, block, most_steps=200, tolerance=1e-8)[0])
    return np.concatenate(blocks)


# --- intervals -------------------------------------------------------------------------------------------------------


def interval(values: Array, level: float) -> tuple[float, float]:
    """Return the percentile interval of a bootstrap's values (resamples,) that holds a share `level` of them."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def predict(fit: Fit, parameters: Array, tokens: Array) -> tuple[Array, Array | None]:
    """Return the loss of runs (n,) that were not made, and what the bootstrap says it may be (resamples, n).

    A new run has what its law leaves open and an error of its own besides. That error is drawn from those of the runs
    of the fit, enlarged by what the constants took up of it.
    """
    parameters, tokens = np.atleast_1d(parameters), np.atleast_1d(tokens)
    loss = fit.law.loss(parameters, tokens)
    if fit.resampled is None:
        return loss, None
    laws = fit.resampled.loss(parameters, tokens)
    rng = np.random.default_rng([fit.seed, 1])
    num_constants = 5 if fit.kind == "both" else 3
    enlarged = np.sqrt(len(fit.points) / max(1, len(fit.points) - num_constants))
    return loss, laws * np.exp(enlarged * rng.choice(fit.errors, size=laws.shape))


def exponent_of_size(law: ScalingLaw) -> Array:
    """Return a = beta / (alpha + beta): the compute-optimal N grows with the a-th power of the FLOPs C = 6 N D."""
    return np.asarray(law.beta / (np.asarray(law.alpha) + law.beta))


def constants_of(law: ScalingLaw, kind: Kind) -> dict[str, Array]:
    """Return the constants of a law by name, and `a`; of a bootstrap's laws, arrays (resamples,)."""
    names: Sequence[str] = {
        "both": ("E", "A", "B", "alpha", "beta"),
        "tokens": ("E", "B", "beta"),
        "parameters": ("E", "A", "alpha"),
    }[kind]
    found = {name: np.asarray(getattr(law, name)) for name in names}
    if kind == "both":
        found["a"] = exponent_of_size(law)
    return {name: numbers.reshape(-1) if numbers.ndim else numbers for name, numbers in found.items()}
