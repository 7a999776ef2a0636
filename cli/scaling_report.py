"""A scaling law in words for people and as JSON lines for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.terminal import clock

if TYPE_CHECKING:
    from transformerlm.experiments.scaling.fit import Fit
    from transformerlm.experiments.scaling.points import Points
    from transformerlm.experiments.scaling.rollout import Rollout
    from transformerlm.experiments.scaling.study import Intervals, Optimum, Prediction, Study

COUNTS = {"all": "all parameters", "without_embeddings": "parameters without embedding and head"}
_MEANING = {"a": "the best N grows as FLOPs^a, if a token costs 6 N FLOPs"}
_MOST_ROWS = 40


def point_records(points: Points) -> list[dict[str, Any]]:
    """Return a record for each point."""
    columns = (points.names, points.parameters, points.body, points.tokens, points.flops, points.seconds, points.losses)
    names = ("run", "parameters", "parameters_without_embeddings", "tokens", "flops", "seconds", "loss")
    return [{name: _plain(value) for name, value in zip(names, row, strict=True)} for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None


def table(points: Points, study: Study) -> Iterator[str]:
    """Yield the points as lines, the cheapest first; of many, the first and the last."""
    fit = study.fit
    errors = {key: float(error) for key, error in zip(_keys(fit.points), fit.errors, strict=True)}
    keys = _keys(points)
    order = sorted(range(len(points)), key=lambda at: float(points.flops[at]))
    yield f"{'parameters':>12}{'tokens':>10}{'FLOPs':>11}{'loss':>9}{'the law':>9}  run"
    left_out = len(order) - _MOST_ROWS
    for place, at in enumerate(order):
        if left_out > 0 and place == _MOST_ROWS // 2:
            yield f"{'...':>12}  {left_out:,} more"
        if left_out > 0 and _MOST_ROWS // 2 <= place < len(order) - _MOST_ROWS // 2:
            continue
        name, loss = points.names[at], points.losses[at]
        law = f"{loss / math.exp(errors[keys[at]]):9.4f}" if keys[at] in errors else f"{'-':>9}"
        size = f"{_large(points.parameters[at]):>12}{_large(points.tokens[at]):>10}{points.flops[at]:11.3g}"
        yield f"{size}{loss:9.4f}{law}  {name}"


def _keys(points: Points) -> list[tuple[Any, ...]]:
    """Return what tells a point from others: in a file of points, many may have one name."""
    return list(zip(points.names, points.tokens, points.flops, points.losses, strict=True))


def law_lines(study: Study) -> Iterator[str]:
    """Yield the law, its constants with their intervals, and how well it fits."""
    from transformerlm.experiments.scaling.fit import constants_of
    from transformerlm.experiments.scaling.study import LEVELS, intervals_of

    fit = study.fit
    yield f"{'law':<10}{_formula(fit)}"
    if study.reason:
        yield f"{'':<10}of one variable alone: {study.reason}"
    if fit.kind != "tokens":
        yield f"{'':<10}N counts {COUNTS[study.count]}"
    intervals = intervals_of(fit)
    heads = "".join(f"{f'{level:.0%} interval':>24}" for level in LEVELS if intervals)
    yield f"{'':<10}{'':>10}{heads}".rstrip()
    for name, value in constants_of(fit.law, fit.kind).items():
        ends = "".join(f"{_between(intervals[name][level]):>24}" for level in LEVELS if intervals)
        yield f"{name:<10}{float(value):>10.4g}{ends}   {_MEANING.get(name, '')}".rstrip()
    rms = math.sqrt(float((fit.errors**2).mean()))
    yield f"{'errors':<10}{rms:.2%} of the loss (root mean square over {len(fit.points)} runs)"
    yield f"{'starts':<10}{fit.reached} of {fit.starts} lead to this minimum"
    if study.other is not None:
        other = study.other.law
        count = COUNTS["without_embeddings" if study.count == "all" else "all"]
        yield f"{'':<10}with {count} as N: {_formula(study.other)}"
        yield f"{'':<10}a = {float(other.beta / (other.alpha + other.beta)):.3f}"
    if weak := weak_exponents(fit):
        sizes = " or ".join(weak)
        yield f"{'':<10}the runs do not say that more {sizes} would help: an interval of the exponent holds 0"


def weak_exponents(fit: Fit) -> list[str]:
    """Return of which sizes the runs do not say that more of them lowers the loss."""
    from transformerlm.experiments.scaling.study import intervals_of

    words = {"alpha": "parameters", "beta": "tokens"}
    by_name = intervals_of(fit)
    return [word for name, word in words.items() if name in by_name and by_name[name][0.95][0] <= 0]


def _formula(fit: Fit) -> str:
    law = fit.law
    terms = [f"{float(law.E):.4g}"]
    if fit.kind != "tokens":
        terms.append(f"{float(law.A):.4g} / N^{float(law.alpha):.4f}")
    if fit.kind != "parameters":
        terms.append(f"{float(law.B):.4g} / D^{float(law.beta):.4f}")
    variables = {"both": "N, D", "tokens": "D", "parameters": "N"}[fit.kind]
    return f"L({variables}) = {' + '.join(terms)}"


def _between(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.4g}, {ends[1]:.4g}]"


def rollout_lines(rollout: Rollout | str) -> Iterator[str]:
    """Yield how the cheaper runs would have predicted the most expensive ones."""
    if isinstance(rollout, str):
        yield f"{'rollout':<10}none: {rollout}"
        return
    number, errors = len(rollout.points), rollout.errors
    yield (
        f"{'rollout':<10}a fit to the {len(rollout.fit.points)} cheaper runs predicts the {number} most expensive "
        f"{errors.mean():+.2%} off"
    )
    inside = rollout.inside
    if number > 1:
        are_in = "" if inside is None else f"; {inside} of them are in their 80% interval"
        yield f"{'':<10}on average, {abs(errors).mean():.2%} in size{are_in}"
    elif inside is not None:
        yield f"{'':<10}{'inside' if inside else 'outside'} its 80% interval"


def edge_lines(best: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield for how many of the budgets that were run the best size is at an end of the sizes."""
    if at_edge := [one for one in best if one["edge"]]:
        yield (
            f"{'edge':<10}of {len(best)} budgets with three sizes or more, {len(at_edge)} have the lowest loss at "
            "their smallest or largest size"
        )


def optimum_lines(optimum: Optimum, words: str) -> Iterator[str]:
    """Yield the best size for a budget that `words` name."""
    yield (
        f"{'best for':<10}{words}: {_large(optimum.parameters)} parameters, {_large(optimum.tokens)} tokens, loss "
        f"{optimum.loss:.4f}"
    )
    if optimum.parameter_intervals:
        sizes, tokens = optimum.parameter_intervals[0.8], optimum.token_intervals[0.8]
        yield f"{'':<10}80% intervals: parameters {_range(sizes)}, tokens {_range(tokens)}"
    if optimum.edges:
        places = " and ".join(f"{side} all {name}" for name, side in (edge.split() for edge in optimum.edges))
        yield f"{'':<10}at the edge of what was run, {places}: this is extrapolated"


def optimum_record(optimum: Optimum, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the best size for a budget as JSON can hold it."""
    from transformerlm.experiments.scaling.study import as_json

    return {
        "asked": dict(asked),
        "unit": optimum.unit,
        "budget": optimum.budget,
        "parameters": optimum.parameters,
        "tokens": optimum.tokens,
        "loss": optimum.loss,
        "parameter_intervals": as_json(optimum.parameter_intervals),
        "token_intervals": as_json(optimum.token_intervals),
        "edges": optimum.edges,
    }


def budget_words(unit: str, budget: float, *, parallel: int) -> str:
    """Return a budget as people say it; runs that were made in parallel have measured a share of the machine."""
    if unit != "seconds":
        return f"{budget:.3g} FLOPs"
    return f"{clock(budget)} on this machine" + (f", shared by {parallel} runs" if parallel > 1 else "")


def _large(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def _range(ends: Sequence[float]) -> str:
    low, high = ends
    return f"{_large(low)} to {_large(high) if math.isfinite(high) else 'any number'}"


def prediction_lines(prediction: Prediction) -> Iterator[str]:
    """Yield what the law says of a run."""
    run = f"{_large(prediction.parameters)} parameters, {_large(prediction.tokens)} tokens"
    if math.isnan(prediction.parameters) or math.isnan(prediction.tokens):
        run = run.partition(", ")[0 if math.isnan(prediction.tokens) else 2]
    yield f"{'predicted':<10}{prediction.name or run}: loss {prediction.loss:.4f}{_in_words(prediction.intervals)}"
    if prediction.is_far:
        far = f"{prediction.far:,.0f} times beyond the runs"
        yield f"{'':<10}{far}: the intervals suppose that the law still holds there"


def _in_words(intervals: Intervals) -> str:
    return "".join(f", {level:.0%} [{low:.4f}, {high:.4f}]" for level, (low, high) in intervals.items())


def prediction_record(prediction: Prediction) -> dict[str, Any]:
    """Return what the law says of a run as JSON can hold it."""
    from transformerlm.experiments.scaling.study import as_json

    return {
        **({"run": prediction.name} if prediction.name else {}),
        "parameters": _plain(prediction.parameters),
        "tokens": _plain(prediction.tokens),
        "loss": prediction.loss,
        "intervals": as_json(prediction.intervals),
        "times_beyond_runs": prediction.far,
    }


def judged_line(outcome: Mapping[str, Any]) -> str:
    """Return how good a prediction was."""
    inside = [f", {'in' if is_in else 'outside'} the {level}% interval" for level, is_in in outcome["inside"].items()]
    words = "" if outcome["before_the_run"] else "; the run had been made before the prediction was written"
    return (
        f"{'outcome':<10}{outcome['run']}: loss {outcome['measured']:.4f}, predicted {outcome['predicted']:.4f} "
        f"({outcome['error']:+.2%}){''.join(inside)}{words}"
    )
