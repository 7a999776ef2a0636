"""Points of laws that are known, which the tests fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from transformerlm.experiments.scaling.law import ScalingLaw
from transformerlm.experiments.scaling.points import Points

KNOWN = ScalingLaw(E=1.8, A=400.0, B=1500.0, alpha=0.33, beta=0.38)


def points_of(parameters: Any, tokens: Any, losses: Any) -> Points:
    """Return points with these numbers, C = 6 N D, and what is not known as NaN."""
    parameters, tokens = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
    unknown = np.full(len(parameters), np.nan)
    names = np.array([f"run {number}" for number in range(len(parameters))], dtype=object)
    sizes = {"parameters": parameters, "tokens": tokens, "flops": 6 * parameters * tokens}
    return Points(names=names, losses=np.asarray(losses, dtype=float), body=unknown, seconds=unknown, **sizes)


def drawn(
    sizes: int = 5, counts: int = 5, *, noise: float = 0.0, seed: int = 0, law: ScalingLaw = KNOWN, span: float = 50.0
) -> Points:
    """Return a grid of `sizes` times `counts` runs with the losses of a law, times errors of a relative size."""
    parameters = np.repeat(np.geomspace(1e6, 1e6 * span, sizes), counts)
    tokens = np.tile(np.geomspace(2e7, 2e7 * span, counts), sizes)
    errors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(tokens)))
    return points_of(parameters, tokens, law.loss(parameters, tokens) * errors)
