"""The runs of a scaling law from the command's side: planned, said, and trained by the sweep's scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.entry import STOP_CODES
from cli.sweep import Signals, check_files, flops_per_second, price, train
from cli.sweep_progress import SweepProgress
from cli.terminal import clock, note, print_record, working
from config.scaling import ScalingConfig
from config.shipped import find_config

if TYPE_CHECKING:
    from transformerlm.experiments.scaling.grid import Grid
    from transformerlm.experiments.sweep.plan import SweepRun

_MOST_EPOCHS = 4


def plan_runs(config: ScalingConfig, directory: Path) -> Grid:
    """Return the runs that a configuration asks for, all of them checked.

    Raises:
        ConfigError: a run is not valid.
        ValueError: the runs, once made, could not bear the law that is asked for.
        FileNotFoundError: the data are not there.
    """
    with working("starting"):
        from transformerlm.experiments.scaling.grid import plan_grid

        assert config.base is not None
        grid = plan_grid(config, find_config(config.base), directory, price)
        check_files([*grid.runs, *grid.holdout])
    _check_support(config, grid)
    _say_epochs([*grid.runs, *grid.holdout])
    return grid


def _check_support(config: ScalingConfig, grid: Grid) -> None:
    """Refuse runs that cannot bear the law, before they take their time; runs made before may add to them."""
    from transformerlm.experiments.scaling.grid import planned_points
    from transformerlm.experiments.scaling.study import without_dropped
    from transformerlm.experiments.scaling.support import choose_law, why_not_both

    if config.runs:
        return
    planned = planned_points(grid.runs, [parameters_of(one, config.fit.parameters) for one in grid.runs])
    points = without_dropped(planned, config.fit)
    problem = why_not_both(points)
    if problem and config.holdout:
        raise ValueError(f"holdout: expected runs that bear a law of sizes and tokens: {problem}")
    choice = choose_law(points, config.fit.law)
    if choice.reason:
        note(f"these runs bear a law of {choice.kind} alone: {choice.reason}")


def _say_epochs(runs: Sequence[SweepRun]) -> None:
    """Say where runs read the data so often that more tokens are no more data (Muennighoff et al. 2023)."""
    from transformerlm.experiments.scaling.grid import tokens_of
    from transformerlm.token_files.dataset import TokenDataset

    longest = max(runs, key=tokens_of)
    held = TokenDataset(longest.config.data.train).num_tokens
    epochs = tokens_of(longest) / held
    if epochs > _MOST_EPOCHS:
        note(
            f"{longest.config.data.train} has {held:,} tokens, which the longest run reads {epochs:.1f} times: beyond "
            f"about {_MOST_EPOCHS} times the law is too hopeful, and a larger text is better"
        )


def parameters_of(run: SweepRun, count: str) -> int:
    """Return the parameters of a run's model, "all" or those "without_embeddings", which has no head either."""
    from transformerlm.models.estimates import parameters_by_part
    from transformerlm.models.settings import ModelSettings

    parts = parameters_by_part(ModelSettings(**run.config.model.model_dump()))
    return sum(parts.values()) - (0 if count == "all" else parts["embeddings"] + parts["head"])


def make_runs(config: ScalingConfig, runs: Sequence[SweepRun], directory: Path) -> tuple[int | None, int]:
    """Train the runs that are not finished; return the exit code if a signal ended it, and how many failed."""
    from transformerlm.experiments.scaling.grid import as_sweep
    from transformerlm.experiments.sweep.queue import SweepDirectory
    from transformerlm.experiments.sweep.scheduler import InOrder

    place, source = SweepDirectory(directory), InOrder(runs)
    with place.hold(), Signals() as signals:
        progress = SweepProgress(len(runs))
        ended = train(as_sweep(config, directory), source, place, signals, progress)
    if ended is not None:
        note(f"{ended}: {progress.done_words()}; the same command goes on")
        return STOP_CODES[ended], 0
    failed = [one for one in source.outcomes if one.state == "failed"]
    for one in failed:
        note(f"\n{one.task.run.name} failed; its last lines, from {place.log_path(one.task.run)}:")
        for line in one.words:
            note(f"   {line}")
    return None, len(failed)


def say_what_would_run(config: ScalingConfig, grid: Grid) -> None:
    """Print a line for each run with its parameters, tokens, FLOPs and hours, and what they need together."""
    from transformerlm.experiments.scaling.grid import tokens_of

    runs = [*grid.runs, *grid.holdout]
    by_cost = sorted(runs, key=lambda one: one.flops_per_token)
    with working("timing a few steps"):
        # Small models compute more slowly than large ones, so both ends are timed.
        ends = [(one.flops_per_token, flops_per_second(one)) for one in (by_cost[0], by_cost[-1])]
    total = 0.0
    note(f"{'parameters':>12}{'tokens':>14}{'FLOPs':>11}{'hours':>9}  run")
    for one in runs:
        seconds = one.flops / _between(ends, one.flops_per_token)
        total += seconds
        size, tokens = parameters_of(one, "all"), tokens_of(one)
        is_holdout = one in grid.holdout
        words = "  (foretold)" if is_holdout else ""
        note(f"{size:12,}{tokens:14,}{one.flops:11.3g}{seconds / 3600:9.3g}  {one.name}{words}")
        facts = {"parameters": size, "parameters_without_embeddings": parameters_of(one, "without_embeddings")}
        facts |= {"tokens": tokens, "flops": one.flops}
        print_record({"event": "planned", "run": one.name, **facts, "hours": seconds / 3600, "holdout": is_holdout})
    note(f"{len(runs)} runs: about {clock(total)} on this machine, validations not counted")


def _between(ends: Sequence[tuple[int, float]], flops_per_token: int) -> float:
    """Return the FLOPs a second of a model between two that were timed, on a straight line of logarithms."""
    (low, slow), (high, fast) = ends
    share = math.log(flops_per_token / low) / math.log(high / low) if high > low else 0.0
    return float(slow * (fast / slow) ** share)
