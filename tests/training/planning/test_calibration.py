"""A few training steps on random tokens, which leave nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.training import timer
from transformerlm.training.planning import calibration
from transformerlm.training.planning.calibration import RandomTokens, calibrate, measured_facts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run; none of them is read."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


def measure(config, steps=3, **settings):
    """Calibrate on the CPU."""
    return calibrate(config, steps, device=CPU, precision="fp32", **settings)


def test_steps_are_measured_one_by_one(files, tmp_path):
    """Each of the requested steps is measured and reported, and takes some time."""
    told = []
    found = measure(tiny_config(files, tmp_path), progress=told.append)
    assert (found.steps, told) == (3, [1, 2, 3])
    assert found.seconds_per_step > 0
    assert found.first_step_seconds > 0
    assert found.matmul_flops_per_second > 1e6
    assert found.peak_bytes is None or found.peak_bytes >= 0


def test_nothing_is_written(files, tmp_path, monkeypatch):
    """Neither the run's directory nor the working directory gets a file, not even for a skipped step."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    diverging = {"optimizer.name": "sgd", "optimizer.learning_rate": 1000.0, "optimizer.max_grad_norm": 0.0}
    config = tiny_config(files, tmp_path / "runs", {**diverging, "training.max_skipped_steps": 0})
    measure(config, 12)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_run_shorter_than_the_calibration_is_measured(files, tmp_path):
    """The schedule is never asked for a step beyond its end."""
    config = tiny_config(files, tmp_path, {"training.max_steps": 3})
    assert measure(config, 8).steps == 8


def test_the_time_of_a_run_is_never_beyond_its_limit(files, tmp_path):
    """A run that max_time ends takes that long."""
    config = tiny_config(files, tmp_path, {"training.max_steps": 10**9, "training.max_time": "90s"})
    plan = {"steps": 10**9, "tokens.per_step": 128, "flops.per_token": 1}
    assert measured_facts(config, 1, plan=plan, device=CPU, precision="fp32")["eta_seconds"] == 90.0


def test_validations_are_measured_and_part_of_the_time(files, tmp_path, monkeypatch):
    """A validation of twice the tokens takes twice the time of the measured batch; without data it takes none."""
    ticks = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))  # everything takes a second
    monkeypatch.setattr(timer, "time", clock)
    batch = {"training.batch_size": 4, "model.context_length": 8}
    config = tiny_config(files, tmp_path, {**batch, "training.eval_tokens": 64, "training.eval_interval": 3})
    found = measure(config)
    assert (found.seconds_per_step, found.seconds_per_validation) == (1.0, 2.0)
    plan = {"steps": 12, "tokens.per_step": 32, "flops.per_token": 1}
    facts = measured_facts(config, 3, plan=plan, device=CPU, precision="fp32")
    assert facts["eta_seconds"] == 12 * 1.0 + 4 * 2.0  # after steps 3, 6, 9 and 12
    assert measure(tiny_config(files, tmp_path, {"data.valid": None})).seconds_per_validation == 0.0


def test_slow_steps_are_fewer(files, tmp_path, monkeypatch):
    """One step is measured in any case, and more only as long as there is time."""
    monkeypatch.setattr(calibration, "MAX_SECONDS", 0.0)
    assert measure(tiny_config(files, tmp_path)).steps == 1


def test_random_tokens_are_of_the_vocabulary_and_the_same_each_time():
    """They replace a token file of any vocabulary, and are longer than one window."""
    tokens, again = (RandomTokens(vocab_size=7, context_length=100) for _ in range(2))
    assert tokens.tokens.max() == 6
    assert len(tokens) == len(tokens.tokens) > 100
    assert (tokens.tokens == again.tokens).all()
