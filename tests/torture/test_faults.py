"""Signals, a second run, a full disk and exploding numbers: the real trainer."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tests.torture.conftest import call
from tests.torture.faults import (
    explode,
    fill,
    meet_a_full_disk,
    meet_a_size_limit,
    small_disk,
    start_twice,
    stop_by_signal,
    stop_by_two_signals,
    stop_while_starting,
)
from tests.torture.harness import Run, one_line_refusal
from tests.torture.process import Surroundings

SLOW = ("--training.batch_size=8192", "--training.micro_batch_size=8")


@pytest.mark.parametrize(
    ("number", "code", "lines"),
    [(signal.SIGTERM, 143, 1), (signal.SIGHUP, 129, 3), (signal.SIGINT, 130, 7), (signal.SIGUSR1, 0, 12)],
)
def test_a_signal_saves_the_last_step(number, code, lines, real, real_reference, tmp_path):
    """Each saves the last finished step and exits with its code, and the run goes on from there."""
    assert stop_by_signal(Run(real, tmp_path), number, code, lines=lines, reference=real_reference) == []


@pytest.mark.parametrize("starts", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_signal_in_the_start_ends_it(starts, real, bare_zygote, tmp_path):
    """A signal at any moment of the start ends the process by its code, without a traceback."""
    run = Run(replace(real, starter=bare_zygote), tmp_path)
    codes = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
    findings = [finding for seed in range(starts) for finding in stop_while_starting(run, *codes[seed % 2], seed=seed)]
    assert findings == []


def test_the_second_signal_ends_at_once(real, tmp_path):
    """A second SIGTERM within the same step ends the process before the step does."""
    assert stop_by_two_signals(Run(real, tmp_path), *SLOW) == []


def test_two_runs_in_one_directory(real, tmp_path):
    """The second run is refused and names the first one's process; after its SIGKILL nothing is held."""
    assert start_twice(Run(real, tmp_path)) == []


@pytest.mark.parametrize("kilobytes", [100, 200])
def test_a_save_that_meets_a_size_limit(kilobytes, real, real_reference, tmp_path):
    """A file that may not grow fails the save in one line, whichever file it is, and costs nothing else."""
    run = Run(real, tmp_path)
    assert meet_a_size_limit(run, max_file_bytes=1000 * kilobytes, reference=real_reference) == []


def test_a_disk_that_fills_while_training(real, real_reference, tmp_path):
    """A full disk stops the run in one line; with room again it goes on; without room it does not start."""
    with small_disk(tmp_path / "disk", kilobytes=4096) as mounted:
        if not mounted:
            pytest.skip("only root can mount a small disk")
        run = Run(real, tmp_path / "disk")
        assert meet_a_full_disk(run, reference=real_reference) == []
        fill(run.home / "ballast")
        files = (tmp_path / "out", tmp_path / "err")
        child = real.starter.start(
            ["--config", "train.toml", "--logging.run_name=other"], run.home, Surroundings(), files
        )
        assert one_line_refusal(child, naming="other", codes=(1,)) == []


COMMANDS = {
    "cli.train_tokenizer": ("--output_dir=out/tokenizer", "--tokenizer.vocab_size=290"),
    "cli.make_data": ("--tokenizer=data/tokenizer", "--train=out/train.npy"),
}


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("limited", ["file size", "disk"])
def test_other_commands_survive_a_full_disk(module, limited, real, zygote, tmp_path):
    """make-data and train-tokenizer end in one line and leave nothing that looks whole; with room they succeed."""
    home = Run(real, tmp_path / "home").home
    (home / "text.txt").write_text("Ada sees the sea. " * 20_000)
    with small_disk(home / "out", kilobytes=16) as mounted:
        if limited == "disk" and not mounted:
            pytest.skip("only root can mount a small disk")
        if limited == "disk":
            fill(home / "out" / "ballast")
        size = 1000 if limited == "file size" else None
        child = call(
            zygote, module, "--input=text.txt", *COMMANDS[module], home=home, around=Surroundings(max_file_bytes=size)
        )
        assert one_line_refusal(child, naming="out", codes=(1,)) == []
        left = [path.name for path in (home / "out").rglob("*") if path.is_file() and path.name != "ballast"]
        assert not {"train.npy", "train.json", "vocab.json", "merges.txt"} & set(left)
    child = call(zygote, module, "--input=text.txt", *COMMANDS[module], home=home)
    assert child.poll() == 0, child.stderr


def test_exploding_numbers_are_not_saved(real, tmp_path):
    """A run whose numbers explode stops, says so, and has no checkpoint that holds a number that is none."""
    wild = ("--optimizer.name=sgd", "--optimizer.learning_rate=1000.0", "--optimizer.max_grad_norm=0.0")
    assert explode(Run(real, tmp_path, interval=1), *wild) == []
