"""Whether a law would have known: fit it without the largest budget, predict that, and compare.

After Bhagia et al. 2024 (arXiv 2412.04403), whose ladder of small runs must predict the large one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transformerlm.experiments.scaling.fit import Fit, fit_law, predict
from transformerlm.experiments.scaling.points import Points
from transformerlm.experiments.scaling.support import why_not_both

Array = np.ndarray
_SAME_BUDGET = 2.0
_LEAST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What a fit to cheaper runs said of the most expensive ones.

    `points` are the runs held out, `predicted` (n,) what the `fit` said, and `low`, `high` (n,) the 80 % interval,
    None without a bootstrap.
    """

    fit: Fit
    points: Points
    predicted: Array
    low: Array | None
    high: Array | None

    @property
    def errors(self) -> Array:
        """The relative errors (n,): 0.01 is a prediction that is 1 % too high."""
        return np.asarray(self.predicted / self.points.losses - 1)

    @property
    def inside(self) -> int | None:
        """How many runs are in their interval; None without intervals."""
        if self.low is None or self.high is None:
            return None
        return int(np.sum((self.low <= self.points.losses) & (self.points.losses <= self.high)))


def roll_out(fit: Fit, *, resamples: int, seed: int) -> Rollout | str:
    """Return how the law would have predicted the largest budget; or, in words, why that cannot be said.

    Held out are the runs with more than half of the FLOPs of the most expensive one, and a tenth of all runs at least.
    """
    points = fit.points
    least = np.sort(points.flops)[-int(np.ceil(_LEAST_SHARE * len(points)))]
    is_large = (points.flops > points.flops.max() / _SAME_BUDGET) | (points.flops >= least)
    rest, held_out = points.where(~is_large), points.where(is_large)
    if fit.kind == "both":
        problem = why_not_both(rest)
    else:
        left = len(np.unique(rest.tokens if fit.kind == "tokens" else rest.parameters))
        problem = "" if left >= 4 else f"only {left} runs that differ are left, expected 4"
    if problem:
        return f"without the largest budget, {problem}"
    smaller = fit_law(rest, fit.kind, resamples=resamples, seed=seed)
    predicted, resampled = predict(smaller, held_out.parameters, held_out.tokens)
    low: Array | None = None
    high: Array | None = None
    if resampled is not None:
        low, high = np.quantile(resampled, [0.1, 0.9], axis=0)
    return Rollout(fit=smaller, points=held_out, predicted=predicted, low=low, high=high)
