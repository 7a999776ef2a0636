"""A run read whole: each step once, numbers as arrays, axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformerlm.experiments.history import read_history


def write_run(directory: Path, lines: list[dict[str, Any] | bytes]) -> Path:
    """Write a run of these lines, and return its directory."""
    directory.mkdir(parents=True)
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (directory / "metrics.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
    (directory / "config.toml").write_text("seed = 3\n[model]\nd_model = 8\n")
    return directory


def test_facts_events_and_series(tmp_path: Path) -> None:
    """Events by their names, numbers by their steps, and nothing else is a series."""
    lines: list[dict[str, Any] | bytes] = [
        {"event": "started", "step": 0, "flops_per_token": 10},
        {"step": 1, "metrics.loss": 3.0, "metrics.tokens": 100, "time.elapsed_s": 0.5},
        {"step": 3, "metrics.loss": "nan", "metrics.tokens": 300, "time.elapsed_s": 1.5},
        {"step": 3, "metrics.val_loss": 2.5},
        {"event": "finished", "step": 3},
    ]
    run = read_history(write_run(tmp_path / "a", lines))
    assert (run.name, run.config, run.bad) == ("a", {"seed": 3, "model.d_model": 8}, 0)
    assert [event["event"] for event in run.events] == ["started", "finished"]
    assert run.series["metrics.loss"].steps.tolist() == [1, 3]
    np.testing.assert_array_equal(run.series["metrics.loss"].values, [3.0, np.nan])
    assert run.series["metrics.val_loss"].values.tolist() == [2.5]
    assert "step" not in run.series


def test_axes_are_interpolated(tmp_path: Path) -> None:
    """Between two lines a step's tokens, operations and seconds lie between theirs."""
    lines: list[dict[str, Any] | bytes] = [
        {"event": "started", "step": 0, "flops_per_token": 10},
        {"step": 1, "metrics.tokens": 100, "time.elapsed_s": 0.5},
        {"step": 3, "metrics.tokens": 300, "time.elapsed_s": 1.5},
    ]
    run = read_history(write_run(tmp_path / "a", lines))
    steps = np.array([0, 1, 2, 3])
    expected = {
        "steps": [0, 1, 2, 3],
        "tokens": [0, 100, 200, 300],
        "flops": [0, 1e3, 2e3, 3e3],
        "seconds": [0, 0.5, 1, 1.5],
    }
    for axis, places in expected.items():
        found = run.axis(axis, steps)  # type: ignore[arg-type]
        assert found is not None
        np.testing.assert_allclose(found, places)


def test_operations_are_those_of_all_tokens(tmp_path: Path) -> None:
    """Of a conversation few tokens are learnt, and all are computed; a start may have had another batch."""
    lines: list[dict[str, Any] | bytes] = [
        {"event": "started", "step": 0, "flops_per_token": 10, "tokens_per_step": 100},
        {"step": 1, "metrics.tokens": 30},
        {"step": 2, "metrics.tokens": 60},
        {"event": "started", "step": 2, "flops_per_token": 10, "tokens_per_step": 50},
        {"step": 4, "metrics.tokens": 90},
    ]
    found = read_history(write_run(tmp_path / "a", lines)).axis("flops", np.array([0, 1, 2, 3, 4]))
    assert found is not None
    assert found.tolist() == [0, 1000, 2000, 2500, 3000]


def test_lines_that_do_not_say_it_have_no_axis(tmp_path: Path) -> None:
    """Without a clock there are no seconds, without `started` no operations."""
    run = read_history(write_run(tmp_path / "a", [{"step": 1, "metrics.tokens": 100}]))
    assert run.axis("seconds", np.array([1])) is None
    assert run.axis("flops", np.array([1])) is None


def test_a_step_that_was_made_twice_counts_once(tmp_path: Path) -> None:
    """After a rollback the later line of a step counts."""
    lines: list[dict[str, Any] | bytes] = [
        {"step": 1, "metrics.loss": 3.0},
        {"step": 2, "metrics.loss": 9.0},
        {"event": "rolled_back", "step": 1},
        {"step": 2, "metrics.loss": 2.0},
    ]
    run = read_history(write_run(tmp_path / "a", lines))
    assert run.series["metrics.loss"].values.tolist() == [3.0, 2.0]


@pytest.mark.parametrize("bad", [b"", b"{", b"[1]", b"\xff\xfe", b'{"step": 1e999}', b"NaN"])
def test_bad_lines_are_counted_and_left_out(tmp_path: Path, bad: bytes) -> None:
    """A line that is no JSON object costs itself and nothing else."""
    lines: list[dict[str, Any] | bytes] = [{"step": 1, "metrics.loss": 3.0}, bad, {"step": 2, "metrics.loss": 2.0}]
    run = read_history(write_run(tmp_path / "a", lines))
    assert run.series["metrics.loss"].steps.tolist() == [1, 2]
    assert run.bad == (0 if bad.startswith(b'{"step"') else 1)


def test_a_half_written_last_line_is_not_bad(tmp_path: Path) -> None:
    """A line that is being written is left for the next reading."""
    directory = write_run(tmp_path / "a", [{"step": 1, "metrics.loss": 3.0}])
    with open(directory / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"step": 2, "metr')
    run = read_history(directory)
    assert (run.bad, run.series["metrics.loss"].steps.tolist()) == (0, [1])


@pytest.mark.parametrize("value", [True, "3", None, [1.0], 10**400])
def test_what_is_no_number_is_left_out(tmp_path: Path, value: Any) -> None:
    """Truth values, words, lists and numbers beyond those of floats are no measurements."""
    run = read_history(write_run(tmp_path / "a", [{"step": 1, "metrics.loss": value}]))
    assert "metrics.loss" not in run.series
