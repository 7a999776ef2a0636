"""`transformerlm-sweep`: many trainings that differ in some settings, and which is best."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.sweep")

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cli.entry import STOP_CODES, heard_signals
from cli.hints import command_line, hint_lines, hints_are_wanted
from cli.sweep_progress import SweepProgress
from cli.tables import table_lines
from cli.terminal import clock, note, print_record, records_as, working
from cli.utils import EXIT_FAILED, Command
from cli.utils import main as run_command
from config.extras import how_to_install
from config.shipped import find_config
from config.sweep import SweepConfig
from config.train import TrainConfig

if TYPE_CHECKING:
    from transformerlm.experiments.sweep.guided import Guided
    from transformerlm.experiments.sweep.halving import Halving
    from transformerlm.experiments.sweep.plan import Planner, SweepRun
    from transformerlm.experiments.sweep.points import Axis, Point
    from transformerlm.experiments.sweep.queue import SweepDirectory
    from transformerlm.experiments.sweep.results import Row
    from transformerlm.experiments.sweep.scheduler import InOrder, Outcome

CALIBRATION_STEPS = 3
BEST = "best.toml"
# What --help shows.
SHORT = (
    "base", "dir", "set", "method", "trials", "seeds",
    "match", "budget", "parallel", "dry_run", "print_commands", "output.format",
)  # fmt: skip
EXAMPLES = (
    ("what the shipped example would run, and for how long", "--config sweep --dry-run"),
    ("three learning rates with two seeds each", "--config sweep"),
    ("a published ablation: the model without its norms", "--config ablations/norm"),
    ("two runs at a time", "--config sweep --parallel=2"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-sweep", SweepConfig, sweep, short=SHORT, examples=EXAMPLES), argv)


def sweep(config: SweepConfig) -> int:
    """Make a sweep and return the exit code."""
    with records_as(config.output.format, in_files=not config.dry_run):
        return _sweep(config)


def _sweep(config: SweepConfig) -> int:
    """Train what the configuration describes and has not been trained yet, compare, and return the exit code.

    Every run is resolved and checked before the first one begins.
    """
    with working("starting"):
        from transformerlm.experiments.sweep.plan import Planner
        from transformerlm.experiments.sweep.points import axes_of
        from transformerlm.experiments.sweep.queue import SweepDirectory

        planner = Planner(config, find_config(config.base), price)
        axes = axes_of(config)
        runs = planner.edge_runs(axes) if config.method == "tpe" else planner.runs(_points(config, axes))
        check_files(runs)
    directory = SweepDirectory(config.dir)
    if config.dry_run:
        _say_what_would_run(config, runs)
        return 0
    if config.print_commands:
        directory.write_queue(runs)
        for one in runs:
            print(command_line("train", "--config", directory.config_path(one)))
        return 0
    with directory.hold(), Signals() as signals:
        source = _source(config, planner, axes, runs, directory)
        progress = SweepProgress(_count(config, runs))
        ended = train(config, source, directory, signals, progress)
    if ended is not None:
        note(f"{ended}: {progress.done_words()}; the same command goes on")
        return STOP_CODES[ended]
    return _finish(config, source.outcomes, directory)


def _points(config: SweepConfig, axes: Sequence[Axis]) -> list[Point]:
    """Return the points of a sweep that knows them beforehand."""
    from transformerlm.experiments.sweep.points import by_chance, grid

    if config.method == "grid":
        return list(grid(axes))
    assert config.trials is not None
    return list(by_chance(axes, trials=config.trials, seed=config.search_seed))


def price(config: TrainConfig) -> int:
    """Return the FLOPs of a token, as transformerlm-plan counts them."""
    from transformerlm.checkpoints.load import fine_tuning_of
    from transformerlm.models.estimates import flops_per_token
    from transformerlm.models.settings import ModelSettings

    model = ModelSettings(**config.model.model_dump())
    return flops_per_token(model, config.model.context_length, fine_tuning_of(config))


def check_files(runs: Sequence[SweepRun]) -> None:
    """Refuse data that is not there: each run would end with the same error.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for name in ("train", "valid", "tokenizer"):
        for path in dict.fromkeys(getattr(one.config.data, name) for one in runs):
            # A tokenizer may be files with a common prefix.
            if path is not None and not path.exists() and not (name == "tokenizer" and any(_beside(path))):
                raise FileNotFoundError(f"data.{name}: {path}: no such file; base or set names it")


def _beside(path: Path) -> Iterator[Path]:
    return path.parent.glob(f"{path.name}*") if path.parent.is_dir() else iter(())


def _source(
    config: SweepConfig, planner: Planner, axes: Sequence[Axis], runs: Sequence[SweepRun], directory: SweepDirectory
) -> InOrder | Halving | Guided:
    """Return what hands out the runs of a sweep."""
    from transformerlm.experiments.sweep.guided import TRIALS, Guided, TrialLog, load_optuna
    from transformerlm.experiments.sweep.halving import Halving
    from transformerlm.experiments.sweep.scheduler import InOrder

    if config.halving:
        return Halving(runs, rungs=config.halving.rungs, factor=config.halving.factor)
    if config.method != "tpe":
        return InOrder(runs)
    assert config.trials is not None
    load_optuna()
    log = TrialLog(directory.root / TRIALS, axes)
    return Guided(axes, lambda point: planner.runs([point]), trials=config.trials, seed=config.search_seed, log=log)


def _count(config: SweepConfig, runs: Sequence[SweepRun]) -> int:
    return (config.trials or 0) * len(config.seeds) if config.method == "tpe" else len(runs)


def train(
    config: SweepConfig,
    source: InOrder | Halving | Guided,
    directory: SweepDirectory,
    signals: Signals,
    progress: SweepProgress,
) -> str | None:
    """Train what a source hands out; return the name of the signal that ended it before, if any."""
    from transformerlm.experiments.sweep.scheduler import Scheduler, train_command

    scheduler = Scheduler(
        directory,
        parallel=config.parallel,
        retries=config.retries,
        environment=_environment(config.parallel),
        tell=progress.tell,
        tick=progress.tick,
        stop=lambda: signals.received,
        command=train_command,
    )
    try:
        scheduler.work(source)
    finally:
        progress.close()
    return signals.first


def _environment(parallel: int) -> dict[str, str]:
    """Return the environment of the trainings, which share the cores equally."""
    environment = {**os.environ, "TRANSFORMERLM_HINTS": "0"}  # ours come at the end
    if parallel > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = os.environ.get("OMP_NUM_THREADS", "")
        most = max(1, cores // parallel)
        environment["OMP_NUM_THREADS"] = str(min(most, int(given)) if given.isdecimal() and int(given) else most)
    return environment


class Signals:
    """Collects the signals that stop a sweep, which then hands each of them on to its trainings."""

    def __init__(self) -> None:
        self.first: str | None = None
        self.received: list[str] = []

    def __enter__(self) -> Signals:
        self._previous = {number: signal.signal(number, self._receive) for number in heard_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.first is None:
            self.first = name
            note(f"{name}: the trainings save and stop; once more to stop them without saving")
        self.received.append(name)


# --- the end -------------------------------------------------------------------------------------------------------


def _finish(config: SweepConfig, outcomes: Sequence[Outcome], directory: SweepDirectory) -> int:
    """Write what came of it, then say it; return the exit code."""
    from transformerlm.experiments.sweep.results import best_of, rows_of, table
    from transformerlm.utils.files import write_whole

    rows = rows_of(outcomes)
    records = [{"event": "result", **row.record()} for row in rows]
    write_whole(directory.root / "results.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    if (best := best_of(rows, outcomes)) is not None:
        _write_best(config, best, directory.root / BEST)
    picture = _draw(rows, directory.root / "effects.png")
    heads, cells = table(rows)
    note("")
    for line in table_lines(heads, cells, left=[len(heads) - 1]):
        note(line)
    for record in records:
        print_record(record)
    _compare(rows, outcomes, directory)
    note(f"\n{picture}")
    if best is not None:
        _say_what_is_best(best, rows, directory)
    failed = [one for one in outcomes if one.state == "failed"]
    for one in failed:
        note(f"\n{one.task.run.name} failed; its last lines, from {directory.log_path(one.task.run)}:")
        for line in one.words:
            note(f"   {line}")
    return EXIT_FAILED if failed else 0


def _compare(rows: Sequence[Row], outcomes: Sequence[Outcome], directory: SweepDirectory) -> None:
    """Say of the settings behind the best one whether the difference is more than luck."""
    from transformerlm.experiments.compare_tables import records, title, verdict_table
    from transformerlm.experiments.statistics import LEAST_SEEDS
    from transformerlm.experiments.sweep.results import compared

    if (comparison := compared(rows, outcomes, directory.root)) is None:
        return
    lines = [f"{LEAST_SEEDS} seeds or more would say whether a difference is more than luck"]
    if len(comparison.results[0].losses) >= LEAST_SEEDS:
        heads, cells = verdict_table(comparison)
        lines = [f"{title(comparison)}:", *table_lines(heads, cells, left=[0, len(heads) - 1])]
    for line in ["", *comparison.notes, *lines]:
        note(line)
    for record in records(comparison):
        print_record({"event": "compared", **record})


def _draw(rows: Sequence[Row], path: Path) -> str:
    """Draw the picture; return where it is, or why there is none."""
    from transformerlm.experiments.sweep.effects import draw_effects

    try:
        draw_effects(rows, path)
    except ImportError as error:
        return f"no picture: {error}; {how_to_install('plot')}"
    except (OSError, ValueError) as error:
        return f"no picture: {error}"
    return f"picture: {path}"


def _write_best(config: SweepConfig, best: SweepRun, path: Path) -> None:
    from transformerlm.experiments.sweep.plan import as_name
    from transformerlm.experiments.sweep.results import best_toml
    from transformerlm.utils.files import write_whole

    write_whole(path, best_toml(best, runs_dir=config.dir.parent, name=f"{as_name(config.dir.name)}-best"))


def _say_what_is_best(best: SweepRun, rows: Sequence[Row], directory: SweepDirectory) -> None:
    from transformerlm.experiments.sweep.results import on_the_edge

    path = directory.root / BEST
    words = ", ".join(f"{name} = {label}" for name, label in best.point.labels.items()) or "base"
    note(f"best: {words}; its settings are in {path}")
    for line in on_the_edge(rows, best):
        note(line)
    print_record({"event": "best", "run": best.name, "settings": dict(best.point.labels), "config": str(path)})
    if hints_are_wanted():
        hints = [
            ("text from the best run", command_line("infer", "--checkpoint", directory.run_dir(best))),
            ("the best settings as a run of its own", command_line("train", "--config", path)),
        ]
        for line in hint_lines(hints):
            note(line)


# --- before the first run ------------------------------------------------------------------------------------------


def _say_what_would_run(config: SweepConfig, runs: Sequence[SweepRun]) -> None:
    """Print a line for each run with its settings, steps, FLOPs and time, and what they need together."""
    from transformerlm.checkpoints.load import fine_tuning_of
    from transformerlm.models.estimates import checkpoint_bytes
    from transformerlm.models.settings import ModelSettings
    from transformerlm.training.planning.preflight import gigabytes

    with working("timing a few steps"):
        rate = flops_per_second(sorted(runs, key=lambda one: one.flops_per_token)[len(runs) // 2])
    total, disk = 0.0, 0.0
    for one in runs:
        seconds = config.budget if config.match == "seconds" else one.flops / rate
        assert seconds is not None
        total += seconds
        model = ModelSettings(**one.config.model.model_dump())
        keep = one.config.checkpoint.keep + 2
        kept: dict[str, Any] = {"optimizer": one.config.optimizer.name, "fine_tuning": fine_tuning_of(one.config)}
        disk += keep * checkpoint_bytes(model, **kept)
        _say_one_run(one, seconds, is_timed=config.match == "seconds")
    over = f" at {config.parallel} a time" if config.parallel > 1 else ""
    how_many = f"{len(runs)} run{'s' * (len(runs) > 1)}{over}"
    if config.method == "tpe":
        tried = _count(config, runs)
        note(f"guided search would try {tried:,} runs; these are the ends of its axes")
        total, disk = total * tried / len(runs), disk * tried / len(runs)
    if config.match == "seconds":
        total /= config.parallel
    until = "at most " if config.halving else "about "
    note(f"{how_many}: {until}{clock(total)} on this machine, validations not counted; {gigabytes(disk)} of disk")


def _say_one_run(one: SweepRun, seconds: float, *, is_timed: bool) -> None:
    steps, flops = one.config.training.max_steps, one.flops
    facts = {"steps": None if is_timed else steps, "flops": None if is_timed else flops, "seconds": seconds}
    size = "" if is_timed else f"{steps:,} steps, {flops:.3g} FLOPs, "
    note(f"{one.name}: {size}about {clock(seconds)}")
    settings = {**one.point.settings, "training.seed": str(one.seed)}
    print_record({"event": "planned", "run": one.name, "settings": settings, **facts})


def flops_per_second(one: SweepRun) -> float:
    """Return the FLOPs a second that a run reaches here, by a few of its steps on random tokens."""
    from transformerlm.distributed.world import World
    from transformerlm.training.planning import micro_batch
    from transformerlm.training.planning.calibration import calibrate
    from transformerlm.utils.allocator import keep_freed_memory
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import resolve_precision

    device = resolve_device(one.config.training.device)
    keep_freed_memory(device)
    precision = resolve_precision(one.config.training.precision, device)
    config = micro_batch.resolve(one.config, device=device, precision=precision, world=World())
    found = calibrate(config, CALIBRATION_STEPS, device=device, precision=precision)
    return one.tokens_per_step * one.flops_per_token / found.seconds_per_step
