"""Pictures of a scaling law, drawn with matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformerlm.experiments.scaling.fit import Fit
from transformerlm.experiments.scaling.optimum import Cost, best_size
from transformerlm.experiments.scaling.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray
_SIZE = (8, 5)  # inches
_MOST_CURVES = 7
_BEYOND = 10.0  # times the most expensive point: how far the frontier is drawn
_COUNTS = {"all": "parameters", "without_embeddings": "parameters without embeddings"}


def draw_pictures(study: Study, directory: Path) -> list[Path]:
    """Draw what the law has to show into a directory; return the files.

    A law of both variables has isoflop curves and a frontier, one of one variable its curve; each has its errors.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    kinds = {"isoflop": _isoflop, "frontier": _frontier} if study.fit.kind == "both" else {"law": _curve}
    files = []
    for name, draw in {**kinds, "residuals": _residuals}.items():
        figure = Figure(figsize=_SIZE, dpi=110, layout="constrained")
        draw(figure, study)
        path = directory / f"{name}.png"
        figure.savefig(path)
        files.append(path)
    return files


def _colours(values: Array) -> tuple[Any, Any]:
    """Return a colour map and the scale of logarithms that a picture's values have on it."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    return colormaps["viridis"], LogNorm(float(values.min()) * 0.999, float(values.max()) * 1.001)


def _axes_of(figure: Figure, title: str, **labels: str) -> Any:
    axes = figure.add_subplot()
    axes.set(xscale="log", title=title, **labels)
    axes.grid(alpha=0.3)
    return axes


def _isoflop(figure: Figure, study: Study) -> None:
    """Draw the loss over the size: each curve is the law at one budget, with its lowest place as a star."""
    fit, cost = study.fit, study.flops or Cost("FLOPs")
    points = fit.points
    axes = _axes_of(
        figure, "Loss at equal compute, and the law", xlabel=_COUNTS[study.count], ylabel="loss (nats per token)"
    )
    colours, scale = _colours(points.flops)
    dots = axes.scatter(points.parameters, points.losses, c=points.flops, cmap=colours, norm=scale, s=22, zorder=3)
    sizes = np.geomspace(points.parameters.min() / 2, points.parameters.max() * 2, 200)
    best = []
    for budget in _budgets(points.flops, points.budgets()):
        losses = fit.law.loss(sizes, budget / (cost.scale * sizes**cost.power))
        axes.plot(sizes, losses, color=colours(scale(budget)), linewidth=1.3)
        size = float(best_size(fit.law, cost, budget)[0])
        if sizes[0] <= size <= sizes[-1]:
            best.append((size, float(fit.law.loss(size, budget / (cost.scale * size**cost.power)))))
    if best:
        axes.plot(*zip(*best, strict=True), "*", color="tab:red", markersize=11, label="lowest by the law", zorder=4)
        axes.legend()
    axes.set(ylim=_limits(np.array([*points.losses, *(loss for _, loss in best)])))
    figure.colorbar(dots, label="FLOPs")


def _budgets(flops: Array, numbers: Array) -> list[float]:
    """Return the budgets to draw: those that several points share, or else some over the range of all."""
    shared = [float(np.median(flops[numbers == one])) for one in np.unique(numbers) if np.sum(numbers == one) > 2]
    if 2 <= len(shared) <= 2 * _MOST_CURVES:
        return shared
    return [float(one) for one in np.geomspace(flops.min(), flops.max(), _MOST_CURVES)]


def _limits(losses: Array) -> tuple[float, float]:
    """Return the limits of an axis with all losses, but without those parts of the curves that go far above them."""
    room = 0.08 * (losses.max() - losses.min()) + 1e-3
    return float(losses.min() - 2 * room), float(losses.max() + room)


def _frontier(figure: Figure, study: Study) -> None:
    """Draw the loss over the compute: each run, and the loss of the best size for each budget."""
    fit, cost = study.fit, study.flops or Cost("FLOPs")
    points = fit.points
    axes = _axes_of(figure, "Loss over compute, and the best for each budget", xlabel="FLOPs", ylabel="loss")
    colours, scale = _colours(points.parameters)
    dots = axes.scatter(points.flops, points.losses, c=points.parameters, cmap=colours, norm=scale, s=22, zorder=3)
    most = points.flops.max()
    budgets = np.geomspace(points.flops.min(), most * _BEYOND, 120)
    losses, between = _best_losses(fit, cost, budgets)
    inside = budgets <= most
    axes.plot(budgets[inside], losses[inside], color="tab:red", label="best by the law")
    axes.plot(budgets[~inside], losses[~inside], "--", color="tab:red", label="beyond the runs")
    if between is not None:
        axes.fill_between(budgets, *between, color="tab:red", alpha=0.15, linewidth=0, label="80 % interval of the law")
    lowest = np.concatenate([points.losses, losses, [] if between is None else between[0]])
    lowest = lowest[np.isfinite(lowest)]  # a law with an exponent below 0 has no best size
    axes.set(ylabel="loss (nats per token)", ylim=(_limits(np.array([*points.losses, lowest.min()]))[0], None))
    axes.legend()
    figure.colorbar(dots, label=_COUNTS[study.count])


def _best_losses(fit: Fit, cost: Cost, budgets: Array) -> tuple[Array, tuple[Array, Array] | None]:
    """Return the loss of the best size for each budget (n,), and its 80 % interval from the bootstrap."""
    pairs = [best_size(fit.law, cost, float(budget)) for budget in budgets]
    losses = np.array([float(fit.law.loss(*pair)) for pair in pairs])
    if fit.resampled is None:
        return losses, None
    columns = np.stack(
        [fit.resampled.loss(*best_size(fit.resampled, cost, float(budget))).reshape(-1) for budget in budgets]
    )
    low, high = np.nanquantile(columns, [0.1, 0.9], axis=1)
    return losses, (low, high)


def _curve(figure: Figure, study: Study) -> None:
    """Draw a law of one variable with its runs."""
    fit = study.fit
    is_tokens = fit.kind == "tokens"
    measured = fit.points.tokens if is_tokens else fit.points.parameters
    label = "tokens" if is_tokens else _COUNTS[study.count]
    axes = _axes_of(figure, "Runs, and the law", xlabel=label, ylabel="loss (nats per token)")
    axes.plot(measured, fit.points.losses, "o", color="tab:blue", label="runs", zorder=3)
    places = np.geomspace(measured.min() / 1.5, measured.max() * _BEYOND, 200)
    inside = places <= measured.max()
    losses = fit.law.loss(places, places)
    axes.plot(places[inside], losses[inside], color="tab:red", label="law")
    axes.plot(places[~inside], losses[~inside], "--", color="tab:red", label="beyond the runs")
    if fit.resampled is not None:
        low, high = np.quantile(fit.resampled.loss(places, places), [0.1, 0.9], axis=0)
        axes.fill_between(places, low, high, color="tab:red", alpha=0.15, linewidth=0, label="80 % interval of the law")
    axes.legend()


def _residuals(figure: Figure, study: Study) -> None:
    """Draw the error of each run over sizes and over tokens: what has a shape there, the law does not say."""
    fit = study.fit
    errors = 100 * np.expm1(fit.errors)
    colours = {"parameters": fit.points.tokens, "tokens": fit.points.parameters}
    for place, (name, other) in enumerate(colours.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        cmap, scale = _colours(other)
        dots = axes.scatter(getattr(fit.points, name), errors, c=other, cmap=cmap, norm=scale, s=22, zorder=3)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set(xscale="log", xlabel=name, ylabel="measured above the law (%)" if not place else "")
        axes.grid(alpha=0.3)
        figure.colorbar(dots, label=next(one for one in colours if one != name), orientation="horizontal")
    figure.suptitle("Errors of the law")
