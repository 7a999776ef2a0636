"""What a report says of a run in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run
from transformerlm.experiments.history import read_history
from transformerlm.experiments.report_facts import checkpoints_of, duration, facts_of
from transformerlm.experiments.run_directories import summary_of

PLANNED = STARTED | {"tokens_per_step": 64, "eta_seconds": 10.0, "memory_estimate_bytes": 3 * 10**8, "device": "cpu"}


def facts(folder, *records: dict[str, Any], **config: Any) -> dict[str, dict[str, str]]:
    """Return the facts of a run of these records."""
    run = write_run(folder, "one", *records, config=config)
    history = read_history(run)
    return {title: dict(rows) for title, rows in facts_of(history, summary_of(run)).items()}


def test_plan_and_outcome(tmp_path):
    """What was planned is beside what came; what was not measured is said to be."""
    lines = [step(number, 3.0) | {"time.elapsed_s": 0.5 * number} for number in range(1, 41)]
    found = facts(tmp_path, PLANNED, *lines, FINISHED | {"step": 40, "reason": "max_time"})
    assert found["Result"]["State"] == "finished (max_time)"
    plan = found["Plan and outcome"]
    assert plan["Steps"] == "50 planned, 40 came"
    assert plan["Tokens"] == "3,200 planned, 2,560 came"
    assert plan["Time"] == "10.0 s planned for 50 steps, 20.0 s trained in all"
    assert plan["Tokens a second"] == "320 planned, 100 came"
    assert plan["Memory"] == "0.30 GB planned, not measured"
    measured = [step(number, 3.0) | {"memory.peak_bytes": 4e8 + number} for number in range(1, 3)]
    words = facts(tmp_path / "cpu", PLANNED, *measured)["Plan and outcome"]["Memory"]
    assert words == "0.30 GB planned, 0.40 GB came, Python and its libraries included"
    words = facts(tmp_path / "cuda", PLANNED | {"device": "cuda:0"}, *measured)["Plan and outcome"]["Memory"]
    assert words == "0.30 GB planned, 0.40 GB came"
    assert plan["FLOPs"] == "1.54e+07"


@pytest.mark.parametrize(
    "changes",
    [{"max_steps": 10**9, "eta_seconds": 30.0}, {"eta_seconds": 30.0}, {"step": 20, "eta_seconds": 19.5}],
    ids=["endless", "cut", "resumed"],
)
def test_a_run_that_time_ends_was_planned_until_then(tmp_path, changes):
    """Neither its steps nor its speed were planned; where the steps end before the time, they were."""
    lines = [step(number, 3.0) | {"time.elapsed_s": 0.5 * number} for number in range(1, 41)]
    plan = facts(tmp_path, PLANNED | changes, *lines, **{"training.max_time": "30s"})["Plan and outcome"]
    assert plan["Steps"] == "until 30s planned, 40 came"
    assert plan["Tokens"] == "until 30s planned, 2,560 came"
    assert plan["Time"] == f"{changes['eta_seconds']} s planned, 20.0 s trained in all"
    assert plan["Tokens a second"] == "100"
    steps_end_it = facts(tmp_path / "steps", PLANNED, *lines, **{"training.max_time": "30s"})["Plan and outcome"]
    assert steps_end_it["Steps"] == "50 planned, 40 came"
    assert steps_end_it["Tokens a second"] == "320 planned, 100 came"


def test_data_has_fingerprints_and_passes(tmp_path):
    """The event `environment` says which data it was, and tokens of it were read so many times."""
    environment = {"event": "environment", "step": 0, "data.train.sha256": "ab" * 32, "data.train.tokens": 128}
    found = facts(tmp_path, environment, PLANNED, *(step(number, 3.0) for number in (1, 2, 3)))
    assert found["Data"]["sha256 of the training tokens"] == "ab" * 32
    assert found["Data"]["Passes over them"] == "1.5"


def test_a_run_that_says_nothing_has_few_rows(tmp_path):
    """Rows of which nothing is known are left out."""
    found = facts(tmp_path, step(1, "nan"))
    assert found["Result"] == {
        "State": "interrupted",
        "Last training loss": "nan at step 1",
        "Losses that are not finite": "1",
    }
    assert found["Data"] == {}


@pytest.mark.parametrize("elapsed", ["nan", "inf"])
def test_a_clock_that_is_no_number_is_no_time(tmp_path, elapsed):
    """A stranger's lines may say so; then the time is that of the summary, where there is one."""
    odd = step(1, 3.0) | {"time.elapsed_s": elapsed}
    assert "Time" not in facts(tmp_path / "none", STARTED, odd)["Plan and outcome"]
    told = {"event": "summary", "step": 1, "seconds": 90}
    assert facts(tmp_path / "told", STARTED, odd, told)["Plan and outcome"]["Time"] == "1 min 30 s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (59.9, "59.9 s"), (90, "1 min 30 s"), (7325, "2 h 2 min"), (3.6e6, "1,000 h 0 min")],
)
def test_times_in_words(seconds, words):
    """Two units at most."""
    assert duration(seconds) == words


def test_checkpoints_have_sizes_and_sums(tmp_path):
    """Each has its step, its names, its bytes and the sums of its weights; one that is damaged has what can be seen."""
    run = write_run(tmp_path, "one", PLANNED, validation(5, 2.5))
    for number, state in (
        (5, {"val_loss": 2.5, "sha256": {"model.safetensors": "cd" * 32, "optimizer.safetensors": "e"}}),
        (7, "broken"),
    ):
        folder = run / f"checkpoints/step-{number:08}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (run / "checkpoints/latest").symlink_to("step-00000007")
    (run / "checkpoints/best").symlink_to("step-00000005")
    (run / "checkpoints/step-00000009").symlink_to(tmp_path)
    first, second = checkpoints_of(run)
    assert first["step"] == 5
    assert (first["names"], first["val_loss"], first["sha256"]) == (["best"], 2.5, {"model.safetensors": "cd" * 32})
    assert first["bytes"] == 1000 + (run / "checkpoints/step-00000005/state.json").stat().st_size
    assert (second["names"], second["val_loss"], second["sha256"]) == (["latest"], None, {})
