"""`transformerlm-scaling`: small runs in, a law out, and what it says of larger ones."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.scaling")

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import scaling_report as report
from cli.scaling_runs import make_runs, parameters_of, plan_runs, say_what_would_run
from cli.terminal import note, print_record, records_as, working
from cli.utils import EXIT_FAILED, Command
from cli.utils import main as run_command
from config.extras import how_to_install
from config.scaling import ScalingConfig
from config.schemas import duration_seconds

if TYPE_CHECKING:
    from transformerlm.experiments.scaling.grid import Grid
    from transformerlm.experiments.scaling.optimum import Cost
    from transformerlm.experiments.scaling.points import Points
    from transformerlm.experiments.scaling.study import Study

DIRECTORY = Path("runs/scaling")
RESULT = "scaling.json"
METRICS = "metrics.jsonl"
# What --help shows.
SHORT = (
    "base", "dir", "runs", "points", "tokens",
    "budgets", "parallel", "fit.law", "optimum.flops", "dry_run", "output.format",
)  # fmt: skip
EXAMPLES = (
    ("what the shipped example would run, and for how long", "--config scaling --dry-run"),
    ("twelve small runs, their law, and the best size for an hour", "--config scaling"),
    ("the law of runs that are there", '--runs "runs/scaling/size*"'),
    ("the law of points in a CSV file, and the best size for 1e21 FLOPs", "--points points.csv --optimum.flops 1e21"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-scaling", ScalingConfig, scaling, short=SHORT, examples=EXAMPLES), argv)


def scaling(config: ScalingConfig) -> int:
    """Fit a scaling law and return the exit code."""
    keeps_files = not config.dry_run and (config.base is not None or config.dir is not None)
    with records_as(config.output.format, in_files=keeps_files):
        return _scaling(config)


def _scaling(config: ScalingConfig) -> int:
    """Make the runs that are missing, fit the law, say what follows from it, and return the exit code."""
    with working("starting"):
        from transformerlm.experiments.scaling.study import study_points

    if config.base is None:
        points = _given_points(config)
        study = study_points(points, config.fit)
        _report(config, points, study, config.dir)
        return 0
    directory = config.dir or DIRECTORY
    grid = plan_runs(config, directory)
    if config.dry_run:
        say_what_would_run(config, grid)
        return 0
    code, failed = make_runs(config, grid.runs, directory)
    if code is not None:
        return code
    points = _with_grid(config, grid, directory)
    study = study_points(points, config.fit)
    result = _report(config, points, study, directory)
    if grid.holdout:
        code, more = _foretell(config, study, grid, directory, result)
        failed += more
        if code is not None:
            return code
    return EXIT_FAILED if failed else 0


# --- the points ----------------------------------------------------------------------------------------------------


def _given_points(config: ScalingConfig) -> Points:
    from transformerlm.experiments.scaling.from_runs import find_runs
    from transformerlm.experiments.scaling.points import read_points

    if config.points is not None:
        return read_points(config.points)
    return _measured(find_runs(config.runs))


def _with_grid(config: ScalingConfig, grid: Grid, directory: Path) -> Points:
    """Return the points of the runs that were made, and of those given besides."""
    from transformerlm.experiments.scaling.from_runs import find_runs

    made = _begun([directory / one.name for one in grid.runs])
    besides = [path for path in find_runs(config.runs) if path.resolve() not in {one.resolve() for one in made}]
    return _measured([*made, *besides])


def _begun(directories: Sequence[Path]) -> list[Path]:
    """Return the directories in which a run has begun."""
    return [path for path in directories if (path / METRICS).is_file()]


def _measured(directories: Sequence[Path]) -> Points:
    """Return the points of run directories, and say which of them do not count."""
    from transformerlm.experiments.scaling.from_runs import read_runs

    found = read_runs(directories)
    for words in found.left_out:
        note(f"left out: {words}")
    if not len(found.points):
        raise ValueError("no scaling law: expected finished runs with a validation loss at their end, found none")
    return found.points


# --- what is said --------------------------------------------------------------------------------------------------


def _report(config: ScalingConfig, points: Points, study: Study, directory: Path | None) -> dict[str, Any]:
    """Say what was found out, write it to a directory if there is one, and return it."""
    from transformerlm.experiments.scaling.study import best_measured, law_record, rollout_record

    note("")
    for line in report.table(points, study):
        note(line)
    note("")
    best = best_measured(points)
    for line in (*report.law_lines(study), *report.rollout_lines(study.rollout), *report.edge_lines(best)):
        note(line)
    rows = report.point_records(points)
    law = law_record(study.fit, study.count) | {"reason": study.reason}
    if study.other is not None:
        other = "without_embeddings" if study.count == "all" else "all"
        law["other"] = law_record(study.other, other)
    result: dict[str, Any] = {"points": rows, "law": law, "rollout": rollout_record(study.rollout)}
    result["best_measured"] = best
    result["optima"] = list(_optima(config, study))
    result["prediction"] = _predicted(config, study)
    for row in rows:
        print_record({"event": "point", **row})
    print_record({"event": "law", **law})
    print_record({"event": "rollout", **result["rollout"]})
    for one in result["best_measured"]:
        print_record({"event": "best_measured", **one})
    for one in result["optima"]:
        print_record({"event": "optimum", **one})
    if result["prediction"]:
        print_record({"event": "prediction", **result["prediction"]})
    if directory is not None:
        _write(directory, result, study)
    return result


def _optima(config: ScalingConfig, study: Study) -> Any:
    """Yield a record for each budget that is asked for, and say it."""
    from transformerlm.experiments.scaling.optimum import Cost
    from transformerlm.experiments.scaling.study import budget_for_tokens

    asked = config.optimum
    flops = study.flops or Cost("FLOPs")
    wanted: list[tuple[Cost | None, float | None, dict[str, Any]]] = []
    wanted += [(flops, budget, {"flops": budget}) for budget in asked.flops]
    wanted += [(study.seconds, duration_seconds(time), {"time": time}) for time in asked.time]
    wanted += [(flops, budget_for_tokens(study, flops, tokens), {"tokens": tokens}) for tokens in asked.tokens]
    for cost, budget, question in wanted:
        if (record := _one_optimum(study, cost, budget, question, parallel=config.parallel)) is not None:
            yield record


def _one_optimum(
    study: Study, cost: Cost | None, budget: float | None, question: dict[str, Any], *, parallel: int
) -> dict[str, Any] | None:
    from transformerlm.experiments.scaling.study import optimum_of

    (name, value), found = next(iter(question.items())), None
    if cost is None:
        note(f"{'best for':<10}{value}: not known, because the runs do not say how long they took, or not by one law")
        return None
    if budget is not None:
        found = optimum_of(study, cost, budget)
    if found is None or budget is None:
        note(f"{'best for':<10}{value}: not known, because the law does not say how N and D trade against each other")
        return None
    words = report.budget_words(cost.unit, budget, parallel=parallel)
    for line in report.optimum_lines(found, f"{value:,} tokens, {words}" if name == "tokens" else words):
        note(line)
    return report.optimum_record(found, question)


def _predicted(config: ScalingConfig, study: Study) -> dict[str, Any] | None:
    """Return the prediction that the configuration asks for, and say it; None without one."""
    from transformerlm.experiments.scaling.study import predict_run

    asked = config.predict
    if asked.parameters is None and asked.tokens is None:
        return None
    needed = {"both": ("parameters", "tokens"), "tokens": ("tokens",), "parameters": ("parameters",)}[study.fit.kind]
    missing = [name for name in needed if getattr(asked, name) is None]
    if missing:
        raise ValueError(
            f"predict.{missing[0]}: expected a number, which the law of {study.fit.kind} needs, found none"
        )
    unknown = float("nan")
    prediction = predict_run(study, parameters=asked.parameters or unknown, tokens=asked.tokens or unknown)
    for line in report.prediction_lines(prediction):
        note(line)
    return report.prediction_record(prediction)


def _write(directory: Path, result: dict[str, Any], study: Study) -> None:
    """Write the result and its pictures."""
    from transformerlm.experiments.scaling.pictures import draw_pictures
    from transformerlm.utils.files import write_whole

    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    written = [str(directory / RESULT)]
    try:
        written += map(str, draw_pictures(study, directory))
    except ImportError as error:
        note(f"no pictures: {error}; {how_to_install('plot')}")
    note(f"\nwritten: {', '.join(written)}")


# --- runs to foretell ----------------------------------------------------------------------------------------------


def _foretell(
    config: ScalingConfig, study: Study, grid: Grid, directory: Path, result: dict[str, Any]
) -> tuple[int | None, int]:
    """Write down what the law says of the holdout runs, make them, and compare; return what `make_runs` does.

    Raises:
        ValueError: the law is one of one variable, which says nothing of a run that differs in both.
    """
    from transformerlm.experiments.scaling.foretold import PREDICTIONS, as_stated, judge, state_predictions
    from transformerlm.experiments.scaling.from_runs import read_runs

    predictions = _predictions(config, study, grid)
    paths = [directory / one.name for one in predictions]
    begun = [path.name for path in _begun(paths)]
    statements = state_predictions(directory, predictions, law=result["law"], made=begun)
    note(f"\nstated in {directory / PREDICTIONS}, where each prediction stays as it was first written:")
    for one in predictions:
        for line in report.prediction_lines(as_stated(one, statements[one.name])):
            note(line)
        print_record({"event": "foretold", "run": one.name, **statements[one.name]})
    code, failed = make_runs(config, grid.holdout, directory)
    if code is not None:
        return code, failed
    measured = read_runs(_begun(paths)).points
    note("")
    judged = []
    for name, loss in zip(measured.names, measured.losses, strict=True):
        outcome = {"run": Path(name).name, **judge(statements[Path(name).name], float(loss))}
        note(report.judged_line(outcome))
        print_record({"event": "judged", **outcome})
        judged.append(outcome)
    _write(directory, result | {"foretold": judged}, study)
    return None, failed


def _predictions(config: ScalingConfig, study: Study, grid: Grid) -> Any:
    from transformerlm.experiments.scaling.grid import tokens_of
    from transformerlm.experiments.scaling.study import predict_run

    if study.fit.kind != "both":
        raise ValueError(f"holdout: expected runs that bear a law of sizes and tokens: {study.reason}")
    sizes = [parameters_of(one, config.fit.parameters) for one in grid.holdout]
    return [
        predict_run(study, parameters=size, tokens=tokens_of(one), name=one.name)
        for size, one in zip(sizes, grid.holdout, strict=True)
    ]
