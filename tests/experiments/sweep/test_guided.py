"""Guided search: points from optuna, in a log from which a search that was killed goes on alike."""

from __future__ import annotations

import math
import sys

import pytest

from tests.experiments.sweep.helpers import planner_of, scheduler_of, sweep_config
from transformerlm.experiments.sweep.guided import Guided, TrialLog, load_optuna, propose
from transformerlm.experiments.sweep.points import axes_of
from transformerlm.experiments.sweep.scheduler import Outcome

pytest.importorskip("optuna")
AXES = [
    {"key": "optimizer.learning_rate", "low": 1e-4, "high": 1.0, "scale": "log"},
    {"key": "model.num_layers", "low": 1, "high": 3},
    {"key": "model.ffn", "values": ["swiglu", "silu"]},
]


def config_of(folder, **changes):
    """Return a guided search over a rate, a number and a choice."""
    return sweep_config(folder, **{"axes": AXES, "method": "tpe", "trials": 3, "seeds": [0], **changes})


def search(folder, config, *, stop=lambda: (), tick=lambda trainings: None) -> Guided:
    """Run a guided search with the stand-in."""
    (folder / "sweep").mkdir(exist_ok=True)
    log = TrialLog(folder / "sweep" / "trials.jsonl", axes_of(config))
    settings = {"trials": config.trials, "seed": config.search_seed, "log": log}
    source = Guided(axes_of(config), lambda point: planner_of(config).runs([point]), **settings)
    scheduler_of(folder, stop=stop, tick=tick).work(source)
    return source


def test_points_follow_from_the_log_alone(tmp_path):
    """A log that was read again proposes the same next point; the search comes close to the best rate."""
    axes = axes_of(config_of(tmp_path))
    log = TrialLog(tmp_path / "trials.jsonl", axes)
    in_flight = 0
    for trial in range(40):
        labels = propose(axes, log, seed=0)
        assert labels["num_layers"] in "123"
        log.ask(labels)
        for known in range(in_flight, trial):  # two at a time: the last one is still being trained
            rate = float(log.asked[known]["learning_rate"])
            log.tell(known, math.inf if known % 9 == 8 else abs(math.log10(rate) + 2))
        in_flight = trial
    again = TrialLog(tmp_path / "trials.jsonl", axes)
    assert (again.asked, again.losses) == (log.asked, log.losses)
    assert propose(axes, again, seed=0) == propose(axes, log, seed=0) != propose(axes, log, seed=4)
    late = [abs(math.log10(float(labels["learning_rate"])) + 2) for labels in log.asked[20:]]
    assert sum(distance < 0.5 for distance in late) > 7  # by chance it would be five of twenty
    assert min(late) < 0.1


def test_a_search_that_was_stopped_asks_for_the_same_points(tmp_path):
    """Stopped in its second run and torn in its last line, it ends with the log of an undisturbed one."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    source = search(whole, config_of(whole))
    assert len(source.outcomes) == 3
    signals, path = [], torn / "sweep" / "trials.jsonl"
    search(
        torn,
        config_of(torn),
        stop=lambda: signals[:1],
        tick=lambda trainings: signals.append("SIGTERM") if len(path.read_text().splitlines()) == 3 else None,
    )
    with path.open("a") as file:
        file.write('{"trial": 1, "lo')
    search(torn, config_of(torn))
    assert path.read_text() == (whole / "sweep" / "trials.jsonl").read_text()


def test_a_point_that_comes_twice_trains_once(tmp_path, monkeypatch):
    """Also while its first run is at work: the result is that of both trials."""
    monkeypatch.setattr("transformerlm.experiments.sweep.guided.propose", lambda *_, **__: {"ffn": "silu"})
    config = config_of(tmp_path, axes=AXES[2:], trials=3)
    log = TrialLog(tmp_path / "trials.jsonl", axes_of(config))
    settings = {"trials": 3, "seed": 0, "log": log}
    source = Guided(axes_of(config), lambda point: planner_of(config).runs([point]), **settings)
    task = source.next()
    assert source.next() is None  # asked for a second and a third time, and not begun again
    numbers = {"val_loss": 2.0, "best_val_loss": 2.0, "best_bits_per_byte": 1.0, "seconds": 1.0}
    source.done(Outcome(task=task, state="finished", step=12, **numbers))
    assert log.losses == {0: 1.0, 1: 1.0, 2: 1.0}


def test_a_log_of_other_axes_is_refused(tmp_path):
    """It would mislead the search."""
    log = TrialLog(tmp_path / "trials.jsonl", axes_of(config_of(tmp_path)))
    log.ask({"learning_rate": "0.5", "num_layers": "2", "ffn": "silu"})
    narrower = [{**AXES[0], "high": 0.1}, *AXES[1:]]
    for axes in (AXES[:1], narrower):
        with pytest.raises(ValueError, match=r"trials.jsonl: expected points on the axes of this sweep, found others"):
            TrialLog(tmp_path / "trials.jsonl", axes_of(config_of(tmp_path, axes=axes)))


@pytest.mark.parametrize(
    "line", ["{}", "[1]", '{"trial": [0], "loss": 1.0}', '{"trial": 0}', '{"trial": 0, "loss": "x"}']
)
def test_a_log_of_something_else_is_refused(tmp_path, line):
    """A damaged line is named before anything is trained; its file stays as it is."""
    path = tmp_path / "trials.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"trials.jsonl: expected the points and results of a search"):
        TrialLog(path, [])
    assert path.read_text() == f"{line}\n"


def test_a_point_that_no_model_can_have_is_a_failure(tmp_path):
    """Which combinations are valid is known only when they are asked for; the search goes on."""
    axes = [{"key": "model.num_heads", "values": [2, 3]}, {"key": "optimizer.learning_rate", "low": 0.01, "high": 0.1}]
    config = config_of(tmp_path, axes=axes, trials=6)
    source = search(tmp_path, config)
    log = TrialLog(tmp_path / "sweep" / "trials.jsonl", axes_of(config))
    assert {labels["num_heads"] for labels in log.asked} == {"2", "3"}
    for trial, labels in enumerate(log.asked):
        assert (log.losses[trial] is None) == (labels["num_heads"] == "3")
    assert len(source.outcomes) == sum(labels["num_heads"] == "2" for labels in log.asked)


def test_without_optuna_an_error_says_what_to_install(monkeypatch):
    """Grid and random search need none."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'method = "tpe" needs optuna.*pip install -e ".\[sweep\]"'):
        load_optuna()
