"""All that is found out from points: the law, what it says of budgets and runs, and whether to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config.scaling import FitConfig
from transformerlm.experiments.scaling.fit import Fit, Kind, constants_of, fit_law, interval, predict
from transformerlm.experiments.scaling.optimum import Cost, best_size, budget_of_tokens, edge_of, measured_cost
from transformerlm.experiments.scaling.points import Points
from transformerlm.experiments.scaling.rollout import Rollout, roll_out
from transformerlm.experiments.scaling.support import choose_law

LEVELS = (0.8, 0.95)
_FAR = 10.0
Intervals = dict[float, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What points say.

    `reason` is why the law is one of one variable alone. `other` is the fit with the other way to count parameters,
    where that is known. `flops` and `seconds` are what a token costs; None where the runs do not say.
    """

    fit: Fit
    count: str
    reason: str
    other: Fit | None
    rollout: Rollout | str
    flops: Cost | None
    seconds: Cost | None


def without_dropped(points: Points, config: FitConfig) -> Points:
    """Return the points that are left when the highest losses are dropped.

    Raises:
        ValueError: none would be left.
    """
    if config.drop_highest >= len(points):
        raise ValueError(f"fit.drop_highest: expected fewer than the {len(points)} runs, found {config.drop_highest}")
    return points.without_highest(config.drop_highest)


def study_points(points: Points, config: FitConfig) -> Study:
    """Return what points say, fitted as the configuration asks.

    Raises:
        ValueError: they cannot bear the law that is wanted.
    """
    points = without_dropped(points, config)
    body = points.without_embeddings()
    used, unused = (points, body) if config.parameters == "all" else (body, points)
    if used is None:
        raise ValueError(f'fit.parameters = "{config.parameters}": the points do not say these; "all" are known')
    choice = choose_law(used, config.law)
    fit = fit_law(choice.points, choice.kind, resamples=config.resamples, seed=config.resample_seed)
    other = None
    if choice.kind == "both" and unused is not None:
        other = fit_law(unused, resamples=config.resamples, seed=config.resample_seed)
    return Study(
        fit=fit,
        count=config.parameters,
        reason=choice.reason,
        other=other,
        rollout=roll_out(fit, resamples=config.resamples, seed=config.resample_seed),
        flops=measured_cost("FLOPs", used.parameters, used.flops / used.tokens),
        seconds=measured_cost("seconds", used.parameters, used.seconds / used.tokens),
    )


def intervals_of(fit: Fit) -> dict[str, Intervals]:
    """Return the intervals of each constant by level; empty without a bootstrap."""
    if fit.resampled is None:
        return {}
    return {
        name: {level: interval(values, level) for level in LEVELS}
        for name, values in constants_of(fit.resampled, fit.kind).items()
    }


# --- a run that was not made -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says of a run: its loss with intervals by level, and how far beyond the cheapest it is.

    `far` is how many times the FLOPs of the most expensive point it would take; below 1 it is among the points.
    """

    name: str
    parameters: float
    tokens: float
    loss: float
    intervals: Intervals
    far: float

    @property
    def is_far(self) -> bool:
        """Whether it is so far beyond the points that the intervals do not say how wrong the law may be there."""
        return self.far > _FAR


def predict_run(study: Study, *, parameters: float, tokens: float, name: str = "") -> Prediction:
    """Return the loss of a run by the law, with the intervals of a new run."""
    fit = study.fit
    loss, resampled = predict(fit, np.array([parameters]), np.array([tokens]))
    cost = study.flops or Cost("FLOPs")
    return Prediction(
        name=name,
        parameters=parameters,
        tokens=tokens,
        loss=float(loss[0]),
        intervals={} if resampled is None else {level: interval(resampled[:, 0], level) for level in LEVELS},
        far=_how_far(fit, cost, parameters, tokens),
    )


def _how_far(fit: Fit, cost: Cost, parameters: float, tokens: float) -> float:
    points = fit.points
    if fit.kind == "both":
        return float(cost.of(parameters, tokens) / cost.of(points.parameters, points.tokens).max())
    own, measured = (tokens, points.tokens) if fit.kind == "tokens" else (parameters, points.parameters)
    return float(own / measured.max())


# --- budgets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best size for a budget.

    `budget` is in `unit`. The intervals are by level, those of the loss of the law alone. `edges` say where N or D are
    outside of what was measured: "parameters above", for one.
    """

    unit: str
    budget: float
    parameters: float
    tokens: float
    loss: float
    parameter_intervals: Intervals = field(default_factory=dict)
    token_intervals: Intervals = field(default_factory=dict)
    edges: list[str] = field(default_factory=list)


def optimum_of(study: Study, cost: Cost, budget: float) -> Optimum | None:
    """Return the best size for a budget in the unit of a cost; None where the law has none."""
    fit = study.fit
    if fit.kind != "both":
        return None
    parameters, tokens = (float(one) for one in best_size(fit.law, cost, budget))
    if not np.isfinite(parameters) or not np.isfinite(tokens):
        return None
    between: list[Intervals] = [{}, {}]
    if fit.resampled is not None:
        columns = best_size(fit.resampled, cost, budget)
        between = [{level: _finite_interval(column, level) for level in LEVELS} for column in columns]
    measured = (("parameters", parameters, fit.points.parameters), ("tokens", tokens, fit.points.tokens))
    edges = [(name, edge_of(value, values)) for name, value, values in measured]
    return Optimum(
        unit=cost.unit,
        budget=budget,
        parameters=parameters,
        tokens=tokens,
        loss=float(fit.law.loss(parameters, tokens)),
        parameter_intervals=between[0],
        token_intervals=between[1],
        edges=[f"{name} {edge}" for name, edge in edges if edge],
    )


def _finite_interval(column: np.ndarray, level: float) -> tuple[float, float]:
    """Return the interval of a bootstrap's optima; a law without one could want any size, so it counts at both ends."""
    flat = column.reshape(-1)
    low, high = np.where(np.isfinite(flat), flat, 0.0), np.where(np.isfinite(flat), flat, np.inf)
    # Without interpolation, in which infinity less infinity would be no number.
    share = (1 - level) / 2
    ends = np.quantile(low, share, method="lower"), np.quantile(high, 1 - share, method="higher")
    return float(ends[0]), float(ends[1])


def budget_for_tokens(study: Study, cost: Cost, tokens: float) -> float | None:
    """Return the budget whose best size is trained on a number of tokens; None where the law has none."""
    if study.fit.kind != "both":
        return None
    budget = budget_of_tokens(study.fit.law, cost, tokens)
    return budget if np.isfinite(budget) else None


def best_measured(points: Points) -> list[dict[str, Any]]:
    """Return, for each budget with three sizes or more, the size with the lowest loss, and whether it is at an edge."""
    found = []
    numbers = points.budgets()
    for number in np.unique(numbers):
        some = points.where(numbers == number)
        if len(np.unique(some.parameters)) < 3:
            continue
        best = int(np.argmin(some.losses))
        size = float(some.parameters[best])
        found.append(
            {
                "flops": float(np.median(some.flops)),
                "parameters": size,
                "tokens": float(some.tokens[best]),
                "loss": float(some.losses[best]),
                "edge": edge_of(size, some.parameters),
            }
        )
    return found


# --- as JSON ---------------------------------------------------------------------------------------------------------


def law_record(fit: Fit, count: str) -> dict[str, Any]:
    """Return a law and its intervals as JSON can hold them."""
    constants: dict[str, Any] = {name: float(value) for name, value in constants_of(fit.law, fit.kind).items()}
    return {
        "law": _FORMULAS[fit.kind],
        "parameters_are": count,
        "runs": len(fit.points),
        **constants,
        "intervals": {name: as_json(by_level) for name, by_level in intervals_of(fit).items()},
        "objective": fit.objective,
        "starts": fit.starts,
        "starts_that_agree": fit.reached,
        "error_rms": float(np.sqrt(np.mean(fit.errors**2))),
    }


_FORMULAS: dict[Kind, str] = {
    "both": "E + A / N^alpha + B / D^beta",
    "tokens": "E + B / D^beta",
    "parameters": "E + A / N^alpha",
}


def as_json(by_level: Intervals) -> dict[str, list[float | None]]:
    """Return intervals by level as JSON can hold them: {"80": [low, high], "95": ...}; null: no end."""
    return {f"{level * 100:g}": [one if np.isfinite(one) else None for one in ends] for level, ends in by_level.items()}


def rollout_record(rollout: Rollout | str) -> dict[str, Any]:
    """Return how the cheaper runs predicted the most expensive ones as JSON can hold it."""
    if isinstance(rollout, str):
        return {"done": False, "why": rollout}
    points = rollout.points
    ends: list[list[float] | None] = [None] * len(points)
    if rollout.low is not None and rollout.high is not None:
        ends = [[float(low), float(high)] for low, high in zip(rollout.low, rollout.high, strict=True)]
    rows: Sequence[Any] = list(zip(points.names, points.losses, rollout.predicted, ends, strict=True))
    return {
        "done": True,
        "fitted_to": len(rollout.fit.points),
        "held_out": len(rows),
        "mean_error": float(rollout.errors.mean()),
        "mean_size_of_error": float(np.abs(rollout.errors).mean()),
        "in_80_percent_interval": rollout.inside,
        "runs": [
            {"run": str(name), "loss": float(loss), "predicted": float(one), "interval_80": between}
            for name, loss, one, between in rows
        ],
    }
