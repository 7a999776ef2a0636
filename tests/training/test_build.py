"""What a run is built of, by its configuration."""

from __future__ import annotations

import pytest

from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.training.build import num_validations


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run of 12 steps."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("eval_interval", "checkpoint_interval", "done", "number"),
    [(1, 0, 0, 12), (4, 0, 0, 3), (0, 5, 0, 3), (0, 0, 0, 1), (1, 0, 10, 2)],
)
def test_the_validations_to_come_are_counted(eval_interval, checkpoint_interval, done, number, files, tmp_path):
    """Those at an interval, those before a checkpoint, and the last step's, after the steps that are done."""
    changes = {"training.eval_interval": eval_interval, "checkpoint.interval": checkpoint_interval}
    assert num_validations(tiny_config(files, tmp_path, changes), done=done) == number
