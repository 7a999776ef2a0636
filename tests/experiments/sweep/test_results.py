"""Rows, the best first, and the best one's configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tomllib

from config.io import dump_toml, load_config
from config.train import TrainConfig
from tests.experiments.sweep.helpers import planned
from transformerlm.experiments.sweep.results import best_of, best_toml, compared, on_the_edge, rows_of, table
from transformerlm.experiments.sweep.scheduler import Outcome, Task


def outcomes_of(folder, *losses: tuple[float, float], states: str = "fff") -> list[Outcome]:
    """Return made-up outcomes of three settings with two seeds; a state by its first letter."""
    words = {"f": "finished", "s": "stopped", "x": "failed"}
    made = []
    for place, run in enumerate(planned(folder)):
        loss, state = losses[place // 2][place % 2], words[states[place // 2]]
        numbers = {"val_loss": loss, "best_val_loss": loss, "best_bits_per_byte": loss / 2, "seconds": 1.0}
        made.append(Outcome(task=Task(run), state=state, step=12 if state == "finished" else 4, **numbers))
    return made


def test_rows_are_sorted_by_the_mean_over_the_seeds(tmp_path):
    """Mean and standard deviation are those of the statistics module; each seed's loss is there."""
    rows = rows_of(outcomes_of(tmp_path, (3.0, 2.0), (1.0, 1.5), (1.25, 1.0)))
    assert [row.labels["learning_rate"] for row in rows] == ["0.1", "0.01", "0.001"]
    assert rows[0].mean == statistics.mean([1.25, 1.0])
    assert rows[0].spread == statistics.stdev([1.25, 1.0])
    assert (rows[0].losses, rows[0].bits_per_byte) == ({0: 1.25, 1: 1.0}, 0.5625)
    json.dumps([row.record() for row in rows], allow_nan=False)


def test_other_tokenizers_are_ranked_by_bits_per_byte(tmp_path):
    """A smaller vocabulary has the lower loss a token, which says nothing."""
    outcomes = outcomes_of(tmp_path, (1.0, 1.0), (3.0, 3.0), (2.0, 2.0))
    bits = [0.9, 0.9, 0.5, 0.5, 0.7, 0.7]
    outcomes = [dataclasses.replace(one, best_bits_per_byte=bit) for one, bit in zip(outcomes, bits, strict=True)]
    rows = rows_of(outcomes)
    assert [row.mean for row in rows] == [3.0, 2.0, 1.0]
    assert best_of(rows, outcomes).point.labels == rows[0].labels
    unknown = [dataclasses.replace(one, best_bits_per_byte=math.inf) for one in outcomes]
    assert [row.mean for row in rows_of(unknown)] == [1.0, 2.0, 3.0]


def test_what_did_not_finish_comes_after_what_did(tmp_path):
    """However low its loss: a run that was stopped early has not finished its schedule."""
    rows = rows_of(outcomes_of(tmp_path, (1.0, 1.0), (3.0, math.inf), (2.0, 2.0), states="sxf"))
    assert [(row.labels["learning_rate"], row.state) for row in rows] == [
        ("0.1", "finished"),
        ("0.001", "stopped"),
        ("0.01", "failed"),
    ]
    assert rows[2].record()["val_loss"] is None
    assert [cells[-2:] for cells in table(rows)[1]] == [["12", ""], ["4", "stopped early"], ["4", "failed"]]


def test_the_best_are_compared_at_their_lowest_losses(tmp_path):
    """The best one first, with the losses by which the rows are sorted; one alone is not compared."""
    outcomes = outcomes_of(tmp_path, (1.75, 1.5), (1.0, 1.5), (1.25, 1.5))
    for one in outcomes:
        run_dir = tmp_path / "sweep" / one.task.run.name
        run_dir.mkdir(parents=True)
        (run_dir / "config.toml").write_text(dump_toml(one.task.run.config))
        losses = {2: 9.0, 6: one.val_loss, 12: 3.0}
        lines = [{"step": at, "metrics.val_loss": loss} for at, loss in losses.items()]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rows_of(outcomes)
    comparison = compared(rows, outcomes, tmp_path / "sweep")
    assert [result.group.name for result in comparison.results] == [row.group for row in rows]
    assert [result.losses for result in comparison.results] == [[1.0, 1.5], [1.25, 1.5], [1.75, 1.5]]
    assert compared(rows[:1], outcomes, tmp_path / "sweep") is None


def test_the_best_configuration_is_a_run_of_its_own(tmp_path):
    """transformerlm-train reads it; it differs from the best run in its name and place alone."""
    outcomes = outcomes_of(tmp_path, (3.0, 2.0), (1.0, 1.5), (5.0, 5.0))
    best = best_of(rows_of(outcomes), outcomes)
    assert best.config.optimizer.learning_rate == 1e-2
    path = tmp_path / "best.toml"
    path.write_text(best_toml(best, runs_dir=tmp_path / "runs", name="sweep-best"))
    config = load_config(TrainConfig, path)
    assert (config.runs_dir, config.logging.run_name) == (tmp_path / "runs", "sweep-best")
    for section in ("model", "optimizer", "training", "data"):
        assert getattr(config, section) == getattr(best.config, section)
    assert tomllib.loads(path.read_text())["optimizer"]["learning_rate"] == 1e-2


def test_there_is_no_best_one_where_none_has_finished(tmp_path):
    """Nor where its loss is not finite."""
    stopped = outcomes_of(tmp_path, (1.0, 1.0), (2.0, 2.0), (3.0, 3.0), states="sss")
    assert best_of(rows_of(stopped), stopped) is None
    endless = outcomes_of(tmp_path, *[(math.inf, math.inf)] * 3)
    assert best_of(rows_of(endless), endless) is None
    assert best_of([], []) is None


def test_a_best_value_on_the_edge_is_said_to_be_one(tmp_path):
    """The best rate may be beyond those that were tried; words have no edge, nor has a value in the middle."""
    for losses, expected in (
        (
            [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)],
            ["learning_rate = 0.001 is the lowest that was tried; a better one may"],
        ),
        ([(2.0, 2.0), (1.0, 1.0), (3.0, 3.0)], []),
        ([(3.0, 3.0), (2.0, 2.0), (1.0, 1.0)], ["learning_rate = 0.1 is the highest that was tried; a better one may"]),
    ):
        outcomes = outcomes_of(tmp_path, *losses)
        rows = rows_of(outcomes)
        assert [words.partition(" be ")[0] for words in on_the_edge(rows, best_of(rows, outcomes))] == expected
