"""The facts of a run are what its lines, its settings and its checkpoints say."""

from __future__ import annotations

import json

from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run
from transformerlm.experiments.facts import checkpoints_of, facts_of

ENVIRONMENT = {
    "event": "environment",
    "step": 0,
    "host": "h",
    "threads": 2,
    "git.dirty": False,
    "command": ["a", "b c"],
}


def test_what_a_run_reached(tmp_path):
    """Best and last validation with their steps, counts of events, settings that are not defaults, damage."""
    records = [STARTED | {"valid_tokens": 9}, ENVIRONMENT, step(10, 5.0), validation(20, 4.0), validation(30, 4.5)]
    records += [{"event": "resumed", "step": 30}, step(40, "nan") | {"time.elapsed_s": 7.5}, FINISHED]
    directory = write_run(tmp_path, "a", *records, config={"training.seed": 3, "optimizer.name": "adamw"})
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("torn\n")
    facts = facts_of(directory)
    expected = {
        "name": "a", "state": "finished", "ended_by": "max_steps", "step": 50, "max_steps": 50, "tokens": 2560,
        "loss": None, "elapsed_s": 7.5, "bad_lines": 1, "num_validations": 2, "resumed_at": [30],
        "best_val_step": 20, "best_val_loss": 4.0, "best_val_bits_per_byte": 2.0, "val_step": 30, "val_loss": 4.5,
        "settings.training.seed": 3, "measured_on.valid_tokens": 9, "environment.threads": 2,
        "environment.command": ["a", "b c"], "events.resumed": 1, "curve": [5.0, 4.0, 4.5, None],
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected
    assert "settings.optimizer.name" not in facts
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_a_run_without_anything(tmp_path):
    """One that was killed before its first step has few facts, and no error."""
    facts = facts_of(write_run(tmp_path, "a"))
    assert (facts["state"], facts["step"], facts["loss"], facts["curve"]) == ("interrupted", 0, None, [])
    assert (facts["checkpoints.steps"], facts["ended_by"]) == ([], None)
    assert "val_loss" not in facts


def test_a_diverged_run_has_no_best_validation(tmp_path):
    """A loss that is not finite is the last one, but not the lowest."""
    facts = facts_of(
        write_run(tmp_path, "a", STARTED, validation(10, "nan", bits="nan"), {"event": "failed", "error": "x"})
    )
    assert (facts["state"], facts["ended_by"], facts["val_step"], facts["val_loss"]) == ("failed", "x", 10, None)
    assert "best_val_loss" not in facts


def test_checkpoints_have_steps_and_sizes(tmp_path):
    """In the order of their steps; links say which is which, and other names are none."""
    root = tmp_path / "checkpoints"
    for name, size in {"step-00000020": 30, "step-00000003": 10, "step-x": 99, "damaged-step-00000004": 5}.items():
        (root / name).mkdir(parents=True)
        (root / name / "model").write_bytes(b"x" * size)
    (root / "latest").symlink_to("step-00000020")
    (root / "best").symlink_to("/etc")
    assert checkpoints_of(tmp_path) == {
        "checkpoints.steps": [3, 20], "checkpoints.bytes": [10, 30], "checkpoints.latest": 20,
    }  # fmt: skip
