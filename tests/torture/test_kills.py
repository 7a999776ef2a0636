"""A run that is killed at any moment goes on as if nothing had happened: the real trainer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.torture.conftest import finished
from tests.torture.kills import kill_again_and_again

VARIANTS = {
    "bf16, 4 micro-batches": ("--training.precision=bf16", "--training.micro_batch_size=2"),
    "wsd, recomputed activations": (
        "--schedule.name=wsd",
        "--schedule.decay_steps=30",
        "--model.activation_checkpointing=true",
    ),
    "sgd with momentum": ("--optimizer.name=sgd", "--optimizer.momentum=0.9", "--training.eval_interval=1"),
}


def show(report, capsys):
    """Print the report's figures, passed or not."""
    with capsys.disabled():
        print(f" {report}", end=" ")


@pytest.mark.parametrize(
    ("kills", "seed"), [pytest.param(12, 1, id="12"), pytest.param(80, 2, id="80", marks=pytest.mark.slow)]
)
def test_kills_lose_nothing(kills, seed, real, real_reference, tmp_path, capsys):
    """After any number of kills no announced checkpoint is lost, and losses and weights are the undisturbed run's."""
    report = kill_again_and_again(real, tmp_path, kills=kills, seed=seed, reference=real_reference)
    show(report, capsys)
    assert report.findings == []
    assert report.kills.total() == kills


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kills_lose_nothing_whatever_is_computed(variant, real, tmp_path, capsys):
    """The same for other precisions, schedules, optimizers and micro-batches, forty kills each."""
    trainer = replace(real, options=VARIANTS[variant])
    reference = finished(trainer, tmp_path / "reference")
    report = kill_again_and_again(trainer, tmp_path, kills=40, seed=4, reference=reference)
    show(report, capsys)
    assert report.findings == []
