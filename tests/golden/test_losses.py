"""The losses of a tiny run are the recorded ones, so no computation has changed by accident."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cli.train import train
from tests.training.tiny_run import step_lines, tiny_config, write_tiny_files

GOLDEN = Path(__file__).parent / "cpu_fp32.json"
CHANGES = {
    "training.max_steps": 20,
    "training.micro_batch_size": 4,
    "training.eval_tokens": 128,
    "optimizer.learning_rate": 1e-2,
}


def test_losses_of_twenty_steps_are_the_recorded_ones(tmp_path):
    """Same text, seed and settings give the same losses on every machine and torch, up to rounding.

    rtol 1e-3: products are summed in another order on other processors, and twenty steps let the last bits grow. After
    a change that is meant to change them, record anew with TRANSFORMERLM_RECORD_GOLDEN=1.
    """
    train(tiny_config(write_tiny_files(tmp_path), tmp_path, CHANGES))
    lines = step_lines(tmp_path / "run")
    found = {
        "loss": [line["metrics.loss"] for line in lines],
        "val_loss": [line["metrics.val_loss"] for line in lines if "metrics.val_loss" in line],
    }
    if os.environ.get("TRANSFORMERLM_RECORD_GOLDEN") == "1":
        rounded = {name: [round(value, 5) for value in values] for name, values in found.items()}
        GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3), name
