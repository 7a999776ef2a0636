"""Predictions that were written down stay as they were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from transformerlm.experiments.scaling.foretold import (
    PREDICTIONS,
    as_stated,
    judge,
    read_predictions,
    state_predictions,
)
from transformerlm.experiments.scaling.study import Prediction


def prediction(name: str, loss: float) -> Prediction:
    """Return a prediction of a loss within a tenth."""
    ends = {0.8: (loss - 0.1, loss + 0.1)}
    return Prediction(name=name, parameters=1e6, tokens=1e8, loss=loss, intervals=ends, far=2.0)


def test_a_statement_is_kept(tmp_path: Path) -> None:
    """A law that is fitted again says something else, and the first statement counts; a new run gets its own."""
    first = state_predictions(tmp_path, [prediction("a", 3.0)], law={"E": 1.0}, made=[])
    again = state_predictions(tmp_path, [prediction("a", 2.0), prediction("b", 2.5)], law={"E": 2.0}, made=["a", "b"])
    assert again["a"] == first["a"]
    assert (again["a"]["loss"], again["a"]["before_the_run"]) == (3.0, True)
    assert (again["b"]["loss"], again["b"]["before_the_run"]) == (2.5, False)
    assert read_predictions(tmp_path / PREDICTIONS) == again
    assert as_stated(prediction("a", 2.0), again["a"]) == prediction("a", 3.0)


def test_a_loss_is_judged_by_the_statement(tmp_path: Path) -> None:
    """The relative error, and whether the loss is inside of each interval."""
    statement = state_predictions(tmp_path, [prediction("a", 3.0)], law={}, made=[])["a"]
    inside, outside = judge(statement, 2.95), judge(statement, 2.5)
    assert (inside["inside"], outside["inside"]) == ({"80": True}, {"80": False})
    assert outside["error"] == pytest.approx(3.0 / 2.5 - 1)


def test_an_interval_without_an_end_is_kept_and_judged(tmp_path: Path) -> None:
    """A law that some resamples put at infinity has none on that side: the next start reads what this one wrote."""
    ends = {0.8: (2.0, math.inf), 0.95: (-math.inf, 2.5)}
    wide = Prediction(name="a", parameters=1e6, tokens=1e8, loss=3.0, intervals=ends, far=2.0)
    first = state_predictions(tmp_path, [wide], law={}, made=[])
    assert first["a"]["intervals"] == {"80": [2.0, None], "95": [None, 2.5]}
    assert state_predictions(tmp_path, [wide], law={}, made=[]) == first
    assert judge(first["a"], 2.9)["inside"] == {"80": True, "95": False}
    assert as_stated(wide, first["a"]) == wide


@pytest.mark.parametrize(
    "text", ['{"a": 1}', '{"a": {"loss": 3.0}}', "[]", '{"a": {"loss": 3.0, "intervals": {"80": 1}}}']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    """It is not overwritten: it may be the user's."""
    path = tmp_path / PREDICTIONS
    path.write_text(text)
    with pytest.raises(ValueError, match=PREDICTIONS):
        state_predictions(tmp_path, [prediction("a", 3.0)], law={}, made=[])
    assert path.read_text() == text
