"""The best validation and the curve of a run are found by searching its lines, and again from where it has grown."""

from __future__ import annotations

import json
import random

import pytest

from tests.experiments.runs import STARTED, lines, step, validation, write_run
from transformerlm.experiments import run_scan
from transformerlm.experiments.run_scan import CURVE_POINTS, RunScan, scan_run


def records(number: int) -> list[dict]:
    """Return lines of a run with a validation at each tenth step, the best one in the middle."""
    found = [STARTED]
    for at in range(1, number + 1):
        found.append(validation(at, 2 + abs(at - number // 2) / 100) if at % 10 == 0 else step(at, 9 - at / number))
    return found


@pytest.mark.parametrize("block", [100, 1000, 8_000_000])
def test_the_best_validation_is_that_of_all_lines(block, tmp_path, monkeypatch):
    """Wherever blocks end; losses of events and of training do not count, nor does one that is not finite."""
    monkeypatch.setattr(run_scan, "_BLOCK_BYTES", block)
    more = [validation(210, "nan", bits="nan"), {"event": "x", "metrics.val_loss": 0.1}, step(211, 0.01)]
    scan = scan_run(write_run(tmp_path, "a", *records(200), *more))
    assert (scan.best_val_loss, scan.best_val_bits_per_byte, scan.best_val_step) == (2.0, 1.0, 100)
    path = tmp_path / "a/metrics.jsonl"
    assert scan.offset == path.stat().st_size


def test_only_what_is_new_is_searched(tmp_path, monkeypatch):
    """A scan goes on where the last one ended, before a line that was half written then."""
    directory = write_run(tmp_path, "a", *records(50))
    path = directory / "metrics.jsonl"
    whole = path.stat().st_size
    line = lines([validation(60, 1.5)])
    with path.open("a") as file:
        file.write(line[:20])
    first = scan_run(directory)
    assert (first.offset, first.best_val_step) == (whole, 20)
    with path.open("a") as file:
        file.write(line[20:])
    searched = []
    found = run_scan._records_with
    monkeypatch.setattr(run_scan, "_records_with", lambda block, key: searched.append(block) or found(block, key))
    assert scan_run(directory, first).best_val_step == 60
    assert searched == [line.encode()]


def test_a_file_that_was_replaced_is_searched_whole(tmp_path):
    """A resumed run has fewer steps, and the system may give the new file the number of the old one."""
    directory = write_run(tmp_path, "a", *records(50))
    first = scan_run(directory)
    path = directory / "metrics.jsonl"
    text = lines([STARTED, validation(5, 7.0), *[step(at, 8.0) for at in range(6, 80)]])
    path.write_text(text)  # in place: the same number, a longer file
    assert path.stat().st_size > first.offset
    assert scan_run(directory, first).best_val_loss == 7.0


def test_the_curve_has_losses_along_the_file(tmp_path):
    """In the order of the steps, from the first to the last, at most a few, each once."""
    scan = scan_run(write_run(tmp_path, "a", *[step(at, 10000 - at) for at in range(1, 5001)]))
    assert 20 <= len(scan.curve) <= CURVE_POINTS + 1
    assert scan.curve == sorted(scan.curve, reverse=True)
    assert len(set(scan.curve)) == len(scan.curve)
    assert (scan.curve[0], scan.curve[-1]) == (9999, 5000)
    short = scan_run(write_run(tmp_path, "b", STARTED, step(1, 3.0), step(2, "nan"), {"event": "finished"}))
    assert short.curve == [3.0, "nan"]


def test_garbage_is_no_run(tmp_path):
    """Bytes of any kind, and an empty file, are searched without finding anything."""
    directory = write_run(tmp_path, "a")
    assert scan_run(directory).curve == []
    generator = random.Random(0)
    for size in (10, 1000, 100_000):
        noise = generator.randbytes(size) + b'"metrics.val_loss"\n"metrics.loss"'
        (directory / "metrics.jsonl").write_bytes(noise)
        assert scan_run(directory).best_val_loss is None


def test_a_scan_is_plain_data(tmp_path):
    """It is kept as JSON and comes back equal."""
    scan = scan_run(write_run(tmp_path, "a", *records(30), step(31, "inf")))
    assert RunScan(**json.loads(json.dumps(vars(scan)))) == scan
