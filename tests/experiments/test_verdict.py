"""What came of runs, in a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run
from transformerlm.experiments.history import read_history
from transformerlm.experiments.report_data import report_data
from transformerlm.experiments.verdict import verdict


def said(*runs: Path) -> str:
    """Return the verdict on runs."""
    histories = [read_history(run) for run in runs]
    return " ".join(verdict(histories, report_data(histories)))


def test_a_run_that_went_well(tmp_path):
    """Its end, its best validation and where that was."""
    run = write_run(tmp_path, "one", STARTED, step(1, 3.0), validation(40, 2.75), validation(50, 2.5), FINISHED)
    best = "Its best validation loss is 2.5000 nats a token, 1.250 bits per byte, at step 50."
    assert said(run) == f"one finished after 50 steps. {best}"


def test_a_run_that_learned_its_text_by_heart(tmp_path):
    """The validation loss rises after its best while the training loss falls."""
    lines = [step(number, 3.0 - number / 50, val_loss=2.5 + abs(number - 20) / 20) for number in range(1, 51)]
    words = said(write_run(tmp_path, "one", STARTED, *lines, FINISHED))
    assert "at step 20. Since then it has risen to 4.0000. The training loss fell meanwhile" in words


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([step(7, 3.0)], "one broke off after 7 steps of 50, without a last word. It has no validation loss."),
        ([step(7, 3.0), FINISHED | {"step": 7, "reason": "signal"}], "was stopped by a signal after 7 steps of 50."),
        ([step(7, "nan")], "It has no validation loss. 1 of its training losses is not finite."),
        ([step(7, 3.0), {"event": "failed", "step": 7}], "ended by an error after 7 steps of 50."),
    ],
)  # fmt: skip
def test_a_run_that_did_not(tmp_path, records, words):
    """How it ended, and what is odd about it."""
    assert words in said(write_run(tmp_path, "one", STARTED, *records))


def test_several_runs_are_ranked(tmp_path):
    """The lowest validation loss and its distance to the next, with the runs that have none."""
    losses: dict[str, Any] = {"a": 2.75, "b": 2.5, "c": 2.625}
    runs = [write_run(tmp_path, name, STARTED, validation(50, loss)) for name, loss in losses.items()]
    words = said(*runs, write_run(tmp_path, "d", step(1, 3.0)))
    assert words.startswith(
        "b has the lowest validation loss: 2.5000 nats a token, at step 50. The next one is c, 0.1250 above it."
    )
    assert words.endswith("Without a validation loss: d.")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("valid_sha256", "validated on different tokens"),
        ("valid_tokens", "validated on different tokens"),
        ("valid_packing", "validated on different tokens"),
        ("tokenizer_sha256", "different tokenizers"),
    ],
)
def test_runs_that_cannot_be_compared_are_not(tmp_path, key, words):
    """Losses on different texts, or over different tokens, are ranked by nobody; a stranger's sum may be anything."""
    said_first = STARTED | {"valid_tokens": 9}
    for folder, sums in (("words", ("a", "b")), ("lists", (["a"], {"b": 1}))):
        runs = [
            write_run(tmp_path / folder, f"run{number}", said_first | {key: one}, validation(50, 2.5))
            for number, one in enumerate(sums)
        ]
        assert words in said(*runs)
        assert "lowest" not in said(*runs)
