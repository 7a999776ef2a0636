"""The runs of a scaling law: each size with each number of tokens, every one with a whole schedule of its own.

The sweep's planner checks all of them before the first one begins, and its scheduler trains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.errors import ConfigError
from config.scaling import HoldoutConfig, ScalingConfig, SizeConfig
from config.sweep import SweepConfig
from transformerlm.experiments.scaling.points import Points
from transformerlm.experiments.sweep.plan import Planner, Price, SweepRun, early_ends
from transformerlm.experiments.sweep.points import Point


@dataclass(frozen=True)
class Grid:
    """The runs to fit, and those to foretell."""

    runs: list[SweepRun]
    holdout: list[SweepRun]


def as_sweep(config: ScalingConfig, directory: Path) -> SweepConfig:
    """Return the settings of the sweep that makes the runs."""
    assert config.base is not None
    return SweepConfig(
        base=config.base,
        dir=directory,
        set=config.set,
        seeds=config.seeds,
        parallel=config.parallel,
        retries=config.retries,
    )


def plan_grid(config: ScalingConfig, base: Path, directory: Path, price: Price) -> Grid:
    """Return the runs that a configuration asks for, checked.

    Raises:
        ConfigError: some are not valid; there is a line for each problem.
    """
    planner = Planner(as_sweep(config, directory), base, price)
    points: list[Point] = []
    for size in config.sizes:
        one = _probe(planner, size)
        if problems := early_ends(one.config):  # tokens say how long a run is, and a law needs whole schedules
            raise ConfigError(problems)
        amounts = [(float(tokens), str(tokens)) for tokens in config.tokens]
        amounts += [(budget / one.flops_per_token, f"{budget:g}FLOPs") for budget in config.budgets]
        points += [_point(size, one, tokens, label) for tokens, label in amounts]
    holdout = [_foretold(planner, one) for one in config.holdout]
    grid = planner.runs(_each_once(points))
    fitted = {_settings_of(run.point) for run in grid}
    twice = [point for point in holdout if _settings_of(point) in fitted]
    if twice:
        raise ConfigError([f"holdout: expected runs that are not in the grid, found {twice[0].labels['size']} there"])
    return Grid(grid, planner.runs(_each_once(holdout)))


def _settings_of(point: Point) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(point.settings.items()))


def _each_once(points: Sequence[Point]) -> list[Point]:
    """Return the points without those that would be the same run as an earlier one: steps are whole numbers."""
    return list({_settings_of(point): point for point in reversed(points)}.values())[::-1]


def _probe(planner: Planner, size: SizeConfig) -> SweepRun:
    """Return a run of a size, with the steps of base, for what does not depend on them."""
    return planner.runs([Point({"size": size.label}, size.settings)])[0]


def _foretold(planner: Planner, size: HoldoutConfig) -> Point:
    return _point(size, _probe(planner, size), size.tokens, str(size.tokens))


def _point(size: SizeConfig, probe: SweepRun, tokens: float, label: str) -> Point:
    """Return the point of a size with a number of tokens, to the nearest step."""
    steps = round(tokens / probe.tokens_per_step)
    if steps < 1:
        raise ConfigError(
            [f"{size.label}: expected at least one step, {probe.tokens_per_step:,} tokens, found {tokens:,.0f} tokens"]
        )
    settings = {**size.settings, "training.max_steps": str(steps)}
    return Point({"size": size.label, "tokens": label}, settings)


def tokens_of(run: SweepRun) -> int:
    """Return the tokens that a run is trained on."""
    return run.config.training.max_steps * run.tokens_per_step


def planned_points(runs: Sequence[SweepRun], sizes: Sequence[int]) -> Points:
    """Return runs that are not made as points, with their parameters and losses that fall as the FLOPs grow.

    Which law they can bear depends on the losses only where some of the highest are left out.
    """
    flops = np.array([one.flops for one in runs], dtype=np.float64)
    tokens = np.array([tokens_of(one) for one in runs], dtype=np.float64)
    unknown = np.full(len(runs), np.nan)
    return Points(
        names=np.array([one.name for one in runs], dtype=object),
        parameters=np.array(sizes, dtype=np.float64),
        tokens=tokens,
        losses=flops.min() / flops,
        flops=flops,
        body=unknown,
        seconds=unknown,
    )
