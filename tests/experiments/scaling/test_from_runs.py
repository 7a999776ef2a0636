"""Points from run directories: whole schedules alone, with numbers that can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformerlm.experiments.scaling.from_runs import find_runs, read_runs

STARTED = {"event": "started", "step": 0, "parameters": 5000, "flops_per_token": 24000, "tokens_per_step": 64}
MIDDLE = {"step": 10, "metrics.loss": 4.0, "metrics.val_loss": 4.2, "metrics.val_bits_per_byte": 2.1}
END = {
    "step": 20,
    "metrics.loss": 3.0,
    "metrics.val_loss": 3.2,
    "metrics.val_bits_per_byte": 1.6,
    "time.elapsed_s": 7.5,
}
FINISHED = {"event": "finished", "step": 20, "reason": "max_steps"}


def write(directory: Path, *records: dict[str, Any], tie: bool = False) -> Path:
    """Write a run of these records, and return its directory."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (directory / "config.toml").write_text(
        f"[model]\nvocab_size = 100\nd_model = 20\ntie_embeddings = {str(tie).lower()}\n"
    )
    return directory


def test_a_finished_run_is_a_point(tmp_path: Path) -> None:
    """Its last validation counts; embedding and head are 2,000 parameters each, of which a tied one is once there."""
    run = write(tmp_path / "a", STARTED, MIDDLE, END, FINISHED)
    tied = write(tmp_path / "b", STARTED, MIDDLE, END, FINISHED, tie=True)
    found = read_runs([run, tied])
    points = found.points
    assert found.left_out == []
    assert points.names.tolist() == [str(run), str(tied)]
    assert points.parameters.tolist() == [5000, 5000]
    assert points.body.tolist() == [1000, 3000]
    assert points.tokens.tolist() == [20 * 64] * 2
    assert points.losses.tolist() == [3.2, 3.2]
    assert points.flops.tolist() == [20 * 64 * 24000] * 2
    assert points.seconds.tolist() == [7.5, 7.5]
    assert found.bits_per_nat == pytest.approx(0.5)


def test_tokens_are_those_of_each_batch_that_it_had(tmp_path: Path) -> None:
    """A run that went on with a larger batch saw fewer tokens than if it had always had it."""
    later = STARTED | {"step": 10, "tokens_per_step": 256}
    run = write(tmp_path / "a", STARTED, MIDDLE, later, END, FINISHED)
    assert read_runs([run]).points.tokens.tolist() == [10 * 64 + 10 * 256]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ((STARTED, MIDDLE), "it has not finished"),
        ((STARTED, END, FINISHED, STARTED), "it has not finished"),
        ((STARTED, MIDDLE, FINISHED | {"reason": "signal"}), "it ended by signal, before its schedule did"),
        ((STARTED, MIDDLE, FINISHED | {"reason": "early_stop"}), "it ended by early_stop"),
        ((STARTED, MIDDLE, FINISHED), "no validation loss at its end"),
        (({"event": "started", "step": 0}, END, FINISHED), "does not say how large the model is"),
        ((STARTED, END | {"metrics.val_loss": "nan"}, FINISHED), "no validation loss at its end"),
    ],
)
def test_what_is_no_whole_schedule_is_left_out(tmp_path: Path, records: tuple[Any, ...], words: str) -> None:
    """A run that goes on, was stopped, or has no loss at its end is named, and is no point."""
    found = read_runs([write(tmp_path / "a", *records)])
    assert len(found.points) == 0
    [left_out] = found.left_out
    assert words in left_out


def test_runs_of_old_versions_have_no_time(tmp_path: Path) -> None:
    """They are points, whose seconds are not known."""
    old = {key: value for key, value in END.items() if key != "time.elapsed_s"}
    assert np.isnan(read_runs([write(tmp_path / "a", STARTED, old, FINISHED)]).points.seconds).all()


def test_losses_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Nats a token of two vocabularies cannot be in one law; runs that do not say are taken."""
    one = write(tmp_path / "a", STARTED | {"tokenizer_sha256": "x"}, END, FINISHED)
    other = write(tmp_path / "b", STARTED | {"tokenizer_sha256": "y"}, END, FINISHED)
    silent = write(tmp_path / "c", STARTED, END, FINISHED)
    assert len(read_runs([one, silent]).points) == 2
    with pytest.raises(ValueError, match=f"{other}: expected the tokenizer of {one}, found another"):
        read_runs([one, other])


def test_names_and_globs_mean_runs(tmp_path: Path) -> None:
    """Each run once, whatever names it; a name without a run is an error."""
    for name in ("law-b", "law-a"):
        write(tmp_path / name, STARTED)
    (tmp_path / "law-empty").mkdir()
    names = [str(tmp_path / "law-b"), str(tmp_path / "law-*")]
    assert [path.name for path in find_runs(names)] == ["law-b", "law-a"]
    with pytest.raises(ValueError, match="expected directories of runs"):
        find_runs([str(tmp_path / "law-empty")])
