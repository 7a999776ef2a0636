"""How much work a run has left."""

from __future__ import annotations

import pytest

from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.training.eta import validations_left, work_left


def config_of(tmp_path, **changes):
    """Return a run of 12 steps of 8 windows, with 16 windows in a validation."""
    files = TinyFiles(*(tmp_path / name for name in ("text", "tokenizer", "train.npy", "valid.npy")))
    return tiny_config(files, tmp_path, {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("eval_interval", "checkpoint_interval", "step", "number"),
    [(1, 0, 0, 12), (4, 0, 0, 3), (4, 0, 4, 2), (4, 0, 11, 1), (0, 5, 0, 3), (0, 5, 5, 2), (0, 0, 0, 1), (4, 1, 6, 6)],
)
def test_validations_come_at_the_shorter_interval_and_at_the_end(
    eval_interval, checkpoint_interval, step, number, tmp_path
):
    """Those before `step` are done; the validation of the last step comes in any case."""
    intervals = {"training__eval_interval": eval_interval, "checkpoint__interval": checkpoint_interval}
    assert validations_left(config_of(tmp_path, **intervals), step) == number


def test_a_validation_costs_a_third_of_its_windows(tmp_path):
    """Processes share steps and validations; without validation data there are no validations."""
    config = config_of(tmp_path)
    assert work_left(config, 0, valid_tokens=0) == 12 * 8
    assert work_left(config, 0, valid_tokens=10**6) == pytest.approx(12 * 8 + 3 * 16 / 3)
    assert work_left(config, 8, valid_tokens=10**6, world_size=2) == pytest.approx(4 * 4 + 2 * 8 / 3)
    assert work_left(config, 12, valid_tokens=10**6) == 0
